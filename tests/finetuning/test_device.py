"""Where trials run: shown, and refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import device
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


def test_a_gpu_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device.described("bf16", torch.device("cuda")) == "NVIDIA H200, bf16"


@pytest.mark.parametrize(
    ("where", "width", "known", "expected"),
    [
        ("cpu", 576, {"avx512_bf16": True}, "bf16"),
        ("cpu", 576, {"amx_bf16": True}, "bf16"),
        ("cpu", 64, {"avx512_bf16": True}, "fp32"),
        ("cpu", 576, {"avx512_f": True, "avx512_bf16": False}, "fp32"),
        ("cuda", 64, {}, "bf16"),
    ],
)
def test_the_arithmetic_follows_from_processor_and_width(
    where: str,
    width: int,
    known: dict[str, bool],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert device.precision_of(torch.device(where), width) == expected


def test_a_study_keeps_the_arithmetic_that_it_began_with(
    study_file: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def said(budget: int) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", str(study_file({"budget": budget}))])
        assert ended.value.code in (0, None, 1)
        return capsys.readouterr().out

    monkeypatch.setattr(device, "precision_of", lambda where, width: "bf16")
    assert ", bf16\n" in said(1)
    # A processor that would begin otherwise goes on as it was begun.
    monkeypatch.setattr(device, "precision_of", lambda where, width: "fp32")
    assert ", bf16\n" in said(2)
    monkeypatch.setattr(device, "can", lambda precision, where: False)
    again = said(3)
    assert "this study began in bf16, which this machine has not" in again
    assert ", fp32\n" in again
