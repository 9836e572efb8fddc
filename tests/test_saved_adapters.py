"""Commands on saved adapters of every kind: right, or refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import cli

Call = Callable[..., tuple[int, str]]
Save = Callable[..., tuple[Path, Any]]

LAYERS = ["q_proj", "down_proj"]
# Adapters whose factors are not their update of the base, as PEFT saves them.
NOT_THEIR_UPDATE: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"kasa_config": "KasaConfig"},
    {"monteclora_config": "MontecloraConfig"},
]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process; gives its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        if code:
            # What a slow machine says of its progress may come before.
            error = printed.err.splitlines()[-1]
            assert error.startswith("error: ") and "Traceback" not in printed.err
            assert len(error) < 500
        return code, printed.out + printed.err

    return run


@pytest.fixture
def save(random_llama: Path, tmp_path: Path) -> Save:
    """Saves an adapter that moved since its start; gives its folder and its logits."""
    import torch
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    def make(base: Path = random_llama, tokens: int = 0, **options: Any) -> tuple[Path, Any]:
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if tokens:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **options}
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=bool(tokens))
        return tmp_path / "adapter", logits(adapted)

    return make


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[], Any]) -> Path:
    from tests.finetuning.architectures import ARCHITECTURES
    from tests.finetuning.architectures import saved_model

    folder = tmp_path_factory.mktemp("gpt2")
    return Path(saved_model("gpt2", ARCHITECTURES["gpt2"], make_tokenizer(), folder))


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


def reloaded(folder: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()


def near(found: Any, wanted: Any) -> bool:
    return float((found - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ],
)
def test_over_tied_embeddings_the_merged_model_computes_what_the_adapter_does(
    options: dict[str, Any], save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, wanted = save(**options)
    code, _ = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "merged")
    assert code == 0
    assert near(logits(reloaded(tmp_path / "merged")), wanted)


def test_the_tied_head_of_transposed_layers_is_parted_too(
    save: Save, gpt2: Path, tmp_path: Path, call: Call
) -> None:
    adapter, wanted = save(gpt2, target_modules=["c_attn", "lm_head"])
    code, _ = call("merge", adapter, "--model", gpt2, "--output", tmp_path / "merged")
    assert code == 0
    assert near(logits(reloaded(tmp_path / "merged")), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6, 7]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
    ],
)
def test_what_merged_well_still_does(
    options: dict[str, Any], save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, wanted = save(**options)
    code, _ = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "merged")
    assert code == 0
    assert near(logits(reloaded(tmp_path / "merged")), wanted)


def test_tokens_that_the_adapter_adds_are_merged_with_it(
    save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, wanted = save(tokens=112)
    code, _ = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "merged")
    assert code == 0
    assert near(logits(reloaded(tmp_path / "merged")), wanted)


def test_a_merge_that_loses_the_adapter_is_refused(
    save: Save, random_llama: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    adapter, _ = save()
    code, said = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "merged")
    assert code == 2 and "would not be the adapter" in said
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, _ = save(layer_replication=[[0, 2], [1, 2]])
    code, said = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "merged")
    assert code == 2 and "layer_replication" in said
    assert not (tmp_path / "merged").exists()


def test_merge_writes_over_nothing(
    save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, _ = save()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    code, said = call("merge", adapter, "--model", random_llama, "--output", tmp_path / "mine")
    assert code == 2 and "not empty" in said
    assert (tmp_path / "mine" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("options", NOT_THEIR_UPDATE, ids=lambda options: str(options))
@pytest.mark.parametrize("command", ["truncate", "sizes", "analyze", "study"])
def test_factors_that_are_not_the_update_are_not_taken_for_it(
    options: dict[str, Any], command: str, save: Save, tmp_path: Path, call: Call
) -> None:
    import peft

    kinds = {key: getattr(peft.tuners.lora.config, value)() for key, value in options.items()
             if key.endswith("_config")}  # fmt: skip
    adapter, _ = save(**{**options, **kinds})
    study = tmp_path / "study.yaml"
    study.write_text("model: tiny\ndata: tiny:dates-small\n")
    code, said = call(*{
        "truncate": ["truncate", adapter, "--energy", "1.0", "--output", tmp_path / "cut"],
        "sizes": ["truncate", adapter],
        "analyze": ["analyze", "--adapter", adapter],
        "study": ["truncate", adapter, "--study", study],
    }[command])  # fmt: skip
    assert code == 2 and next(iter(options)) in said
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_starts_that_need_data_are_refused_too(start: str, save: Save, call: Call) -> None:
    adapter, _ = save()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    code, said = call("truncate", adapter)
    assert code == 2 and f"init_lora_weights {start}" in said


def test_factors_that_embedding_and_head_share_are_not_cut_apart(
    save: Save, tmp_path: Path, call: Call
) -> None:
    adapter, _ = save(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    code, said = call("truncate", adapter, "--rank", 2, "--output", tmp_path / "cut")
    assert code == 2 and "ensure_weight_tying" in said


def test_block_diagonal_factors_are_refused(save: Save, call: Call) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(
        target_modules_bd_a=LAYERS[:1], target_modules_bd_b=LAYERS[1:], nblocks=2
    )
    adapter, _ = save(use_bdlora=blocks)
    for command in (["truncate", adapter], ["analyze", "--adapter", adapter]):
        code, said = call(*command)
        assert code == 2 and "use_bdlora" in said


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "mica"},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
        {"lora_bias": True},
        {"alora_invocation_tokens": [9]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_keeping_all_of_an_adapter_changes_nothing(
    options: dict[str, Any], save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, wanted = save(**options)
    code, _ = call("truncate", adapter, "--energy", "1.0", "--output", tmp_path / "cut")
    assert code == 0
    assert near(logits(reloaded(random_llama, tmp_path / "cut")), wanted)


def damaged(folder: Path, file: str, how: str) -> None:
    """Damages one of an adapter's files, as disks and hands do it."""
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "junk":
        path.write_bytes(b"\x80\xff junk \x00" * 20)
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(folder / "nowhere")
    elif how == "empty":
        path.touch()


FILES = ("adapter_model.safetensors", "adapter_config.json")
WAYS = ("truncated", "junk", "deleted", "folder", "link", "empty")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_damaged_files_are_one_sentence(
    file: str, how: str, save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, _ = save()
    damaged(adapter, file, how)
    study = tmp_path / "study.yaml"
    study.write_text("model: tiny\ndata: tiny:dates-small\n")
    for command in (
        ["truncate", adapter, "--rank", 2, "--output", tmp_path / "cut"],
        ["truncate", adapter],
        ["truncate", adapter, "--study", study],
        ["merge", adapter, "--output", tmp_path / "merged"],
        ["merge", adapter, "--model", random_llama, "--output", tmp_path / "merged"],
        ["analyze", "--adapter", adapter],
        ["analyze", "--adapter", adapter, "--model", random_llama],
    ):
        code, said = call(*command)
        assert code == 2 and file in said
    assert not (tmp_path / "cut").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "3",
        '"LORA"',
        "{}",
        '{"peft_type": 3}',
        '{"peft_type": "LORA", "r": "four"}',
        '{"peft_type": "LORA", "r": 0}',
        '{"peft_type": "LORA", "lora_alpha": NaN}',
        '{"peft_type": "LORA", "lora_alpha": "16"}',
        '{"peft_type": "LORA", "alpha_pattern": ["q_proj"]}',
        '{"peft_type": "LORA", "alpha_pattern": {"(": 3}}',
        '{"peft_type": "LORA", "target_parameters": 5}',
        '{"peft_type": "LORA", "base_model_name_or_path": ["a"]}',
        '{"peft_type": "' + "X" * 3000 + '"}',
        "[" * 100_000,
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
    ],
    ids=range(17),
)
def test_strange_configurations_are_one_sentence(
    content: str, save: Save, random_llama: Path, tmp_path: Path, call: Call
) -> None:
    adapter, _ = save()
    (adapter / "adapter_config.json").write_text(content)
    for command in (
        ["truncate", adapter],
        ["merge", adapter, "--model", random_llama, "--output", tmp_path / "merged"],
        ["analyze", "--adapter", adapter],
    ):
        assert call(*command)[0] == 2


@pytest.mark.parametrize("name", ["A", "B"])
def test_weights_that_are_no_numbers_or_no_factors_are_one_sentence(
    name: str, save: Save, call: Call
) -> None:
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file

    adapter, _ = save()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(f"lora_{name}.weight"))
    for value in (torch.full_like(tensors[key], math.nan), torch.ones(3, 3), torch.ones(0, 4)):
        save_file({**tensors, key: value}, file)
        for command in (["truncate", adapter], ["analyze", "--adapter", adapter]):
            assert call(*command)[0] == 2
