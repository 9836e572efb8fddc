"""A study in one call."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_lora_rl import tune
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from tests.study.conftest import SMALL
from tests.study.conftest import PaperTuner


def test_tune_returns_the_best_and_goes_on_when_asked_for_more(
    paper: type[PaperTuner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"model": "tiny", "train": "tiny:dates-small", "space": SMALL["space"],
                 "output": tmp_path / "out", "objective": {"cost_weight": 0.2}}  # fmt: skip
    result = tune(**arguments, trials=2, seed=5)
    assert len(result.study.trials) == 2 and set(paper.seeds) == {5}
    assert result.best_score == result.study.best_value
    assert result.best_configuration["max_steps"] == 4
    assert result.adapter == tmp_path / "out" / "best" and (result.adapter / "best.json").exists()
    assert len(tune(**arguments, trials=4, seed=5).study.trials) == 4
    assert capsys.readouterr().out == ""


def test_tune_says_what_is_wrong(paper: type[PaperTuner], tmp_path: Path) -> None:
    arguments = {"model": "tiny", "train": "tiny:dates-small", "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"tune: objective.metric is 'bleu'"):
        tune(**arguments, objective={"metric": "bleu"})
    with pytest.raises(UserError, match="tune: trainnig is not a known key"):
        tune(**arguments, trainnig={})
    paper.failures = [FineTuningError("error", "nothing works")] * 3
    with pytest.raises(UserError, match="all failed the same way: nothing works"):
        tune(**arguments)


def test_an_interruption_reaches_the_caller(paper: type[PaperTuner], tmp_path: Path) -> None:
    paper.failures = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        tune(model="tiny", train="tiny:dates-small", output=tmp_path / "out", trials=2)


def test_tune_shows_its_progress_unless_told_to_be_quiet(
    paper: type[PaperTuner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"model": "tiny", "train": "tiny:dates-small", "space": SMALL["space"],
                 "output": tmp_path / "out"}  # fmt: skip
    tune(**arguments, trials=2)
    said = capsys.readouterr()
    assert "trial   1 (2/2)  score" in said.err and not said.out
    tune(**arguments, trials=3, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_result_reads_as_what_was_found(paper: type[PaperTuner], tmp_path: Path) -> None:
    folder = tmp_path / "<out>"
    result = tune(model="tiny", train="tiny:dates-small", space=SMALL["space"], output=folder,
                  trials=2)  # fmt: skip
    said, page = repr(result), result._repr_html_()
    best = f"{result.best_score:.4f} (trial {result.study.best_trial.number})"
    assert "Study object at" not in said and len(said.splitlines()) == 4
    assert all(best in text and "max_steps 4" in text for text in (said, page))
    assert str(folder / "best") in said
    assert "&lt;out&gt;" in page and "<out>" not in page
