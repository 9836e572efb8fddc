"""Where trials run: shown, and refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from tests.finetuning.runs import Make
from tests.study.conftest import PaperTuner
from tests.study.conftest import paper  # noqa: F401
from tests.study.conftest import study_file  # noqa: F401


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_gpu_that_is_asked_for_and_not_there_is_refused(
    command: str,
    study_file: Callable[..., Path],  # noqa: F811
    paper: type[PaperTuner],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(study_file({"training.use_cpu": False}))])
    assert ended.value.code == 2 and not paper.seeds
    error = capsys.readouterr().err
    assert error.startswith("error: training.use_cpu is false, but ")
    assert error.endswith("leave the key out to train on the CPU\n") and error.count("\n") == 1


def test_a_tuner_refuses_it_too(make_tuner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.use_cpu is false, but"):
        make_tuner(use_cpu=False).prepare()


def test_device_and_precision_stand_in_the_first_lines_and_in_the_report(
    study_file: Callable[..., Path],  # noqa: F811
    paper: type[PaperTuner],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    file = study_file({"training.precision": "bf16", "budget": 1})
    with pytest.raises(SystemExit):
        cli.main(["run", str(file)])
    first = capsys.readouterr().out.splitlines()[:3]
    assert "training on CPU (AVX512), bf16" in first
    report = (file.parent / "out" / "report.html").read_text()
    assert "trained on CPU (AVX512), bf16" in report


def test_a_gpu_is_called_by_its_name(
    study_file: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optuna_lora_rl.finetuning import device
    from optuna_lora_rl.study import spec

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    training = spec.load(study_file()).training
    assert device.described(training) == "NVIDIA H200, bf16"
