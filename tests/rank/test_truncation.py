from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import merging
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import truncation

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def decaying(adapted: Callable[..., Any]) -> Callable[..., Any]:
    """Attaches an adapter whose directions matter less and less."""

    def make(**options: Any) -> Any:
        peft = adapted(r=8, **options)
        with torch.no_grad():
            for layer in layers.lora_layers(peft).values():
                r = layer.r["default"]
                layer.lora_B["default"].weight.mul_(0.5 ** torch.arange(r))
        return peft

    return make


def reload(random_llama: Path, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(random_llama)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("limit", [{"energy": 0.9}, {"rank": 3}])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_truncating_gives_the_updates_of_pefts_conversion(
    decaying: Callable[..., Any],
    random_llama: Path,
    tmp_path: Path,
    ids: Any,
    limit: Any,
    use_rslora: bool,
) -> None:
    from peft import convert_to_lora

    peft = decaying(
        use_rslora=use_rslora, rank_pattern={"down_proj": 6}, alpha_pattern={"q_proj": 3}
    )
    peft.save_pretrained(tmp_path / "whole")
    report = truncation.truncate(tmp_path / "whole", tmp_path / "cut", **limit)
    _, expected = convert_to_lora(peft, rank=limit.get("energy", limit.get("rank")))
    again = reload(random_llama, tmp_path / "cut")
    for name, layer in layers.lora_layers(again).items():
        a, b = (expected[f"{layers.PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        assert report.after[name] == layer.r["default"] == a.shape[0]
        assert torch.allclose(layer.get_delta_weight("default"), b @ a, atol=1e-5)
    attached = truncation.truncate_attached(peft, **limit)
    assert attached.after == report.after
    assert torch.allclose(peft(ids).logits, again(ids).logits, atol=1e-4)


def test_the_report_counts(decaying: Callable[..., Any], tmp_path: Path) -> None:
    peft = decaying()
    peft.save_pretrained(tmp_path)
    attached = layers.lora_layers(peft)
    products = {n: m.get_delta_weight("default").detach() for n, m in attached.items()}
    before = saved.read(tmp_path)
    report = truncation.truncate(tmp_path, tmp_path, rank=2)
    after = saved.read(tmp_path)
    assert set(report.before.values()) == {8} and set(report.after.values()) == {2}
    assert (report.parameters_before, report.parameters_after) == (
        before.parameters,
        after.parameters,
    )
    assert report.kept == 0.25
    for name, one in after.factors.items():
        whole = products[name]
        lost = torch.dist(whole, one.scaling * one.b @ one.a) / whole.norm()
        assert float(lost) == pytest.approx(report.errors[name], abs=1e-5)


def test_all_else_that_an_adapter_holds_stays(
    decaying: Callable[..., Any], random_llama: Path, tmp_path: Path, ids: Any
) -> None:
    peft = decaying(use_dora=True, target_modules=["q_proj"])
    peft.save_pretrained(tmp_path)
    logits = peft(ids).logits
    before = saved.read(tmp_path)
    truncation.truncate(tmp_path, tmp_path, energy=1.0)
    after = saved.read(tmp_path)
    assert set(after.tensors) == set(before.tensors)
    magnitudes = [name for name in before.tensors if "magnitude" in name]
    assert magnitudes
    assert all(torch.equal(after.tensors[n], before.tensors[n]) for n in magnitudes)
    assert torch.allclose(reload(random_llama, tmp_path)(ids).logits, logits, atol=1e-4)


def test_layers_that_are_not_linear_keep_their_rank(
    adapted: Callable[..., Any], random_llama: Path, tmp_path: Path, ids: Any
) -> None:
    peft = adapted(
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"embed_tokens": 5, "q_proj": 3},
        alpha_pattern={"q_proj": 2},
    )
    peft.save_pretrained(tmp_path)
    truncation.truncate(tmp_path, tmp_path, rank=2)
    again = reload(random_llama, tmp_path)
    found = [layer.r["default"] for layer in layers.lora_layers(again).values()]
    assert found == [2] * 4
    assert again.base_model.model.model.embed_tokens.r["default"] == 5
    truncation.truncate_attached(peft, rank=2)
    assert torch.allclose(again(ids).logits, peft(ids).logits, atol=1e-4)


def test_an_adapter_without_effect_keeps_one_direction(
    adapted: Callable[..., Any], tmp_path: Path
) -> None:
    adapted(random=False).save_pretrained(tmp_path)
    report = truncation.truncate(tmp_path, tmp_path, energy=0.9)
    assert set(report.after.values()) == {1}
    assert set(report.errors.values()) == {0.0}


def test_sizes_by_energy(decaying: Callable[..., Any], tmp_path: Path) -> None:
    peft = decaying()
    peft.save_pretrained(tmp_path)
    found = truncation.sizes(saved.read(tmp_path).factors, [0.5, 0.9, 1.0])
    assert [one.parameters for one in found] == sorted(one.parameters for one in found)
    assert [one.error for one in found] == sorted((one.error for one in found), reverse=True)
    assert found[-1].largest_rank == 8
    assert found[-1].error == pytest.approx(0, abs=1e-6)
    for one in found[:-1]:
        assert one.error <= (1 - one.energy) ** 0.5


def test_merging_writes_an_ordinary_model(
    decaying: Callable[..., Any], random_llama: Path, tmp_path: Path, ids: Any
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    peft = decaying()
    peft.save_pretrained(tmp_path / "adapter")
    size = merging.merge(random_llama, tmp_path / "adapter", tmp_path / "merged")
    assert size == sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, peft(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab").input_ids


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ({}, "either an energy or a rank"),
        ({"energy": 0.5, "rank": 2}, "either an energy or a rank"),
        ({"energy": 1.5}, "energy is a share"),
        ({"rank": 0}, "rank is at least 1"),
        ({"rank": 1}, "holds no adapter"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, limit: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        truncation.truncate(tmp_path, tmp_path, **limit)


def test_a_base_that_does_not_fit_is_one_sentence(
    decaying: Callable[..., Any], tmp_path: Path
) -> None:
    decaying().save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(UserError, match="cannot be merged into"):
        merging.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
