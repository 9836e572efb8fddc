from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import resizing
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.initialisation import KINDS
from optuna_lora_rl.rank.initialisation import Kind
from optuna_lora_rl.rank.initialisation import initialise
from tests.rank.conftest import language_loss

Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
DOWN1 = "model.layers.1.mlp.down_proj"


def factors(peft: Any) -> Any:
    return {name: layers.factors_of(layer) for name, layer in layers.lora_layers(peft).items()}


def weights(model: Any) -> Any:
    return {name: module.weight.clone() for name, module in layers.linear_modules(model).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_training_starts_from_the_base(
    model: Any, adapted: Callable[..., Any], ids: Any, kind: Kind, both: bool, use_dora: bool
) -> None:
    base = model(ids).logits
    before = weights(model)
    peft = adapted(random=False, r=3, use_dora=use_dora)
    start = initialise(peft, kind, both=both)
    assert torch.allclose(peft(ids).logits, base, atol=1e-4)
    for one in factors(peft).values():
        assert (one.a != 0).any()
        assert (one.b != 0).any() == both
    assert set(start.initial) == (set(factors(peft)) if both else set())
    start.restore(peft)
    for name, weight in weights(peft).items():
        assert torch.equal(weight, before[name])


def test_unless_asked_otherwise(adapted: Callable[..., Any], model: Any, ids: Any) -> None:
    base = model(ids).logits
    peft = adapted(random=False)
    start = initialise(peft, "kaiming", both=True, compensate=False)
    assert start.weights == {}
    assert not torch.allclose(peft(ids).logits, base, atol=1e-2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_trained_and_resized_adapter_loads_on_the_original_base(
    adapted: Callable[..., Any],
    ids: Any,
    random_llama: Path,
    tmp_path: Path,
    use_rslora: bool,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft = adapted(random=False, use_rslora=use_rslora, rank_pattern={"q_proj": 3})
    start = initialise(peft, "svd", both=True)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for ranks in ({Q0: 6}, {DOWN1: 2}, {}):
        language_loss(peft, ids).backward()
        optimizer.step()
        resizing.resize(peft, ranks, optimizer=optimizer)
    start.save(peft, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(random_llama).eval()
    fresh = base(ids).logits
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(again(ids).logits, peft(ids).logits, atol=1e-4)
    assert not torch.allclose(again(ids).logits, fresh, atol=1e-2)
    assert [one.rank for one in factors(again).values()] == [9, 8, 6, 6]


def test_a_start_without_effect_is_saved_as_it_is(
    adapted: Callable[..., Any], tmp_path: Path
) -> None:
    peft = adapted(random=False)
    initialise(peft, "xavier").save(peft, tmp_path)
    again = spectrum.of_all(saved.read(tmp_path).factors)
    assert {len(one.values) for one in again.values()} == {4}


@pytest.mark.parametrize("rank", [3, 4, 40])
def test_orthogonal_starts_of_any_rank(adapted: Callable[..., Any], rank: int) -> None:
    peft = adapted(random=False, r=rank)
    initialise(peft, "orthogonal", gain=2.0)
    a = factors(peft)[Q0].a
    small = a @ a.T if rank <= 32 else a.T @ a
    assert torch.allclose(small, 4 * torch.eye(min(rank, 32)), atol=1e-5)


def test_sizes_are_those_of_the_rules(adapted: Callable[..., Any]) -> None:
    peft = adapted(random=False, r=32)
    size = lambda name: float(factors(peft)[name].a.std())  # noqa: E731
    initialise(peft, "xavier")
    assert size(Q0) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    initialise(peft, "kaiming")
    assert size(Q0) == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    initialise(peft, "layer-adaptive", decay=0.75)
    assert size(Q0) == pytest.approx((1 / 96) ** 0.5, rel=0.05)
    assert size(Q1) == pytest.approx(0.25 * size(Q0), rel=0.1)


def test_weight_adaptive_starts_have_the_weights_size(adapted: Callable[..., Any]) -> None:
    peft = adapted(random=False, r=8)
    weight = layers.linear_modules(peft)[Q0].weight
    found = spectrum.of_matrix(weight)
    initialise(peft, "weight-adaptive")
    expected = float(weight.std()) * found.effective_rank / 32
    assert float(factors(peft)[Q0].a.std()) == pytest.approx(expected, rel=0.15)
    with torch.no_grad():
        # One direction only, far less than its standard deviation says.
        weight.copy_(torch.outer(torch.ones(32), torch.randn(32)))
    initialise(peft, "weight-adaptive")
    assert float(factors(peft)[Q0].a.std()) == pytest.approx(float(weight.std()) / 32, rel=0.15)


def test_svd_begins_with_a_given_target(adapted: Callable[..., Any]) -> None:
    peft = adapted(random=False, r=2, lora_alpha=6)
    target = torch.randn(32, 2) @ torch.randn(2, 32)
    initialise(peft, "svd", both=True, targets={Q0: target})
    one = factors(peft)[Q0]
    assert torch.allclose(one.scaling * one.b @ one.a, target, atol=1e-4)
    initialise(peft, "svd", targets={Q0: target})
    a = factors(peft)[Q0].a
    # Unit rows that span what the target reads.
    assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-5)
    assert torch.allclose(target @ a.T @ a, target, atol=1e-4)


def test_seeds_repeat(adapted: Callable[..., Any]) -> None:
    peft = adapted(random=False)
    found = []
    for seed in (0, 0, 1):
        initialise(peft, "kaiming", seed=seed)
        found.append(factors(peft)[Q0].a.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_transposed_weights_are_compensated_too() -> None:
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 4))
    x = torch.randn(3, 4)
    base = model(x)
    config = LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True)
    peft = get_peft_model(model, config)  # type: ignore[arg-type]
    start = initialise(peft, "svd", both=True)
    assert torch.allclose(peft(x), base, atol=1e-5)
    start.restore(peft)
    assert torch.equal(layers.linear_modules(peft)["0"].weight @ torch.eye(6), start.weights["0"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "magic"}, "there is no initialisation 'magic'"),
        ({"kind": "xavier", "gain": 0.0}, "gain is a factor over 0"),
        ({"kind": "xavier", "decay": 2.0}, "decay is a share"),
        ({"kind": "xavier", "targets": {}}, "targets go with the initialisation svd"),
        ({"kind": "svd", "targets": {"nowhere": torch.eye(2)}}, "no layer 'nowhere'"),
        ({"kind": "svd", "targets": {Q0: torch.eye(2)}}, r"shape \(2, 2\), not \(32, 32\)"),
    ],
)
def test_bad_input_is_one_sentence(adapted: Callable[..., Any], arguments: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        initialise(adapted(), **arguments)
