from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning.options import ModelOptions

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> model.Base:
    return model.load(ModelOptions(name=str(folder), **options), CPU)


def test_a_local_model_is_loaded_frozen(random_llama: Path) -> None:
    base = load(random_llama)
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.architecture.layers == 2 and base.architecture.hidden == 32


def test_the_built_in_model_is_loaded_by_its_name() -> None:
    base = model.load(ModelOptions(), CPU)
    assert Path(base.name).is_dir()
    assert base.architecture.model_type == "llama"


def test_a_tokenizer_without_padding_pads_with_its_end(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = None
    path.write_text(json.dumps(config))
    base = load(folder)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id


def test_the_fingerprint_follows_the_weights(random_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from safetensors.torch import save_file

    folder = shutil.copytree(random_llama, tmp_path / "copy")
    assert load(folder).fingerprint == load(random_llama).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).fingerprint != load(random_llama).fingerprint
    assert load(random_llama, dtype="bfloat16").fingerprint != load(random_llama).fingerprint


def test_the_fingerprint_follows_whatever_is_loaded(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "copy")
    shell = load(folder).model

    def written(name: str) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new", encoding="utf-8")
        return model._fingerprint(str(folder), shell)

    before = model._fingerprint(str(folder), shell)
    loaded = ("qwen.tiktoken", "source.spm", "merges.txt", "additional_chat_templates/tool.jinja")
    assert len({before, *map(written, loaded)}) == 5
    before = model._fingerprint(str(folder), shell)
    others = (".git/HEAD.json", "README.md", "notes.txt", "runs/a/cache/sums.json", "results.json")
    assert {before} == {written(name) for name in (*others, "runs/a/best/model.safetensors")}
    # Code of the model's own may read anything beside it.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    before = model._fingerprint(str(folder), shell)
    assert len({before, written("modeling_own.py"), written("own.json")}) == 3


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_the_fingerprint_sees_a_merged_adapter(tmp_path: Path, end: str) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    small = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    with torch.device("meta"):
        shell = LlamaForCausalLM(small)
    # Large enough that whoever reads ends alone does not come to the middle.
    weights = {name: torch.zeros(1024, 1024) for name in "abc"}

    def saved(changed: str | None) -> str:
        if changed is not None:
            weights[changed] = torch.ones(1024, 1024)
        if end == ".bin":
            torch.save(weights, tmp_path / "pytorch_model.bin")
        else:
            save_file(weights, tmp_path / "model.safetensors")
        return model._fingerprint(str(tmp_path), shell)

    (tmp_path / "unfetched.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert len({saved(None), saved("b"), saved("a"), saved("c")}) == 4
    assert saved(None) == saved(None)


def test_weights_that_are_no_language_model_are_one_sentence(
    random_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "there is no folder"),
        ("./nothing", "there is no folder"),
        ("org/model", "no connection"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        model.load(ModelOptions(name=name), CPU)
    assert str(refused.value).startswith("model.name: ")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model \(config\.json\)"):
        load(tmp_path)


def save_llama(random_llama: Path, folder: Path, **changes: Any) -> None:
    """Copies the random Llama, with another configuration in its file."""
    shutil.copytree(random_llama, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.mark.parametrize("has_model", [True, False])
def test_a_folder_with_an_adapter_is_refused(
    random_llama: Path, tmp_path: Path, has_model: bool
) -> None:
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(random_llama)
    adapted = get_peft_model(base, LoraConfig(r=1, target_modules=["q_proj"]))
    if has_model:
        save_llama(random_llama, tmp_path / "model")
    adapted.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"holds an adapter.*merge it first") as refused:
        load(tmp_path / "model")
    assert ("beside a model" in str(refused.value)) == has_model


def test_weights_of_other_shapes_are_named(random_llama: Path, tmp_path: Path) -> None:
    save_llama(random_llama, tmp_path / "model", vocab_size=120)
    with pytest.raises(UserError, match=r"embed_tokens.weight has the shape \(\d+, 32\).*vocab"):
        load(tmp_path / "model")


def test_weights_that_are_in_no_file_are_not_made_up(random_llama: Path, tmp_path: Path) -> None:
    save_llama(random_llama, tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lacks weights of a LlamaForCausalLM.*layers\.2\."):
        load(tmp_path / "model")
