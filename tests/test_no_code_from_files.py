"""Files of others are data: nothing in them is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning import training
from optuna_lora_rl.learning.settings import TrainingSettings
from optuna_lora_rl.rank import saved


class Harm:
    """What writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """An adapter whose weights are a pickle."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["truncate", "ADAPTER"],
        ["analyze", "--adapter", "ADAPTER"],
        ["merge", "ADAPTER", "--model", "tiny", "--output", "OUT"],
    ],
)
def test_an_adapter_that_is_a_pickle_is_refused(
    command: list[str], pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"ADAPTER": str(pickled), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        cli.main([places.get(word, word) for word in command])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "adapter_model.bin is a pickle, which can run code" in said
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "out").exists()


def test_beside_safe_weights_a_pickle_is_not_read(pickled: Path, tmp_path: Path) -> None:
    name = "base_model.model.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}
    save_file(tensors, pickled / "adapter_model.safetensors")
    assert saved.read(pickled).parameters == 16
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", ["pickle", "junk", "empty", "a list", "zeros"])
def test_a_checkpoint_that_is_none_is_one_sentence(content: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    match content:
        case "pickle":
            torch.save(Harm(tmp_path / "harmed"), file)
        case "a list":
            torch.save([1, 2], file)
        case "empty":
            file.touch()
        case "junk":
            file.write_bytes(b"not a checkpoint")
        case _:
            file.write_bytes(bytes(10_000))
    with pytest.raises(UserError, match=r"output: .*checkpoint\.pt is damaged or no checkpoint"):
        training.train(tmp_path, TrainingSettings())
    assert not (tmp_path / "harmed").exists()
