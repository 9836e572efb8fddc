"""What programs read: JSON and nothing else; and how much a run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import cli
from tests.study.conftest import PaperTuner


def says(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command])
    assert not ended.value.code
    return capsys.readouterr().out


def test_status_explain_best_and_validate_answer_in_json(
    paper: type[PaperTuner],
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(study_file({"budget": 4, "name": "[bold]"}))
    says("run", file, "--quiet", capsys=capsys)
    known: dict[str, Any] = {
        command: json.loads(says(command, file, "--json", capsys=capsys))
        for command in ("status", "explain", "best", "validate")
    }
    assert known["status"]["states"] == {"complete": 4}
    assert known["status"]["best"]["trial"] == known["best"]["trial"]
    assert [row["trial"] for row in known["explain"]["trials"]] == [0, 1, 2, 3]
    assert sum(p["importance"] for p in known["explain"]["parameters"]) == pytest.approx(1)
    assert known["validate"]["study"] == "[bold]" and "lora_rank" in known["validate"]["tuned"]


def test_a_run_says_nothing_or_every_evaluation(
    paper: type[PaperTuner],
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says("run", str(study_file({"budget": 1})), "--quiet", capsys=capsys) == ""
    said = says("run", str(study_file({"budget": 2})), "--verbose", capsys=capsys)
    assert "trial   1 evaluation 1 of 2" in said and "trial   1 evaluation 2 of 2" in said
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(study_file()), "--quiet", "--verbose"])
    assert ended.value.code == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_encoding_and_any_brackets(
    paper: type[PaperTuner],
    study_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
) -> None:
    file = str(study_file({"budget": 2, "name": "[x] [bold]"}))
    for command in ("run", "status", "best", "explain", "validate"):
        with (tmp_path / command).open("w", encoding=encoding) as out:
            monkeypatch.setattr("sys.stdout", out)
            with pytest.raises(SystemExit) as ended:
                cli.main([command, file])
        assert not ended.value.code
        said = (tmp_path / command).read_text(encoding=encoding)
        assert "[x] [bold]" in said or command in ("best", "explain")
