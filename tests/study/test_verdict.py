"""A study that found nothing says so: exit status, summary, report and Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_lora_rl import cli
from optuna_lora_rl import tune
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.study import runner
from tests.study.conftest import SMALL
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

DIFFERENT = [
    FineTuningError("error", "no such kernel"),
    FineTuningError("diverged", "the loss was nan"),
    FineTuningError("out-of-memory", "no memory"),
]
# On paper quality falls by 0.2 a decade of the learning rate: all of these are below 0.
WORSE = {"space.learning_rate": [1e-9, 1e-10]}


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    return exit.value.code, " ".join(capsys.readouterr().out.split())


def test_a_study_whose_trials_all_failed_or_were_pruned_ends_with_status_1(
    paper: type[PaperTuner], study_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file()
    paper.failures = list(DIFFERENT)
    code, said = ended(["run", str(file)], capsys)
    words = "o trial was completed: 3 failed; trial 2 failed by: no memory"
    assert code == 1 and words in said
    # The same command again ends the same way, and so says status.
    assert ended(["run", str(file)], capsys)[0] == 1
    assert words in ended(["status", str(file)], capsys)[1]
    assert words in (file.parent / "out" / "report.html").read_text()


def test_every_trial_pruned_is_status_1(
    paper: type[PaperTuner], study_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file({"pruner": {"name": "threshold", "lower": 5.0}})
    code, said = ended(["run", str(file)], capsys)
    assert code == 1
    assert "No trial was completed: 3 pruned; the pruner leaves none" in said


@pytest.mark.parametrize("objectives", [["score"], ["quality", "cost"]])
def test_a_best_that_is_worse_than_the_untuned_model_is_status_1(
    paper: type[PaperTuner],
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    objectives: list[str],
) -> None:
    file = study_file(WORSE | {"objective.objectives": objectives})
    code, said = ended(["run", str(file)], capsys)
    assert code == 1
    assert "is no better than the untuned model (quality -0.2" in said
    assert "no better than the untuned model" in (file.parent / "out" / "report.html").read_text()


def test_a_good_study_says_nothing_of_the_kind(
    paper: type[PaperTuner], study_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file()
    paper.failures = [DIFFERENT[0]]
    code, said = ended(["run", str(file)], capsys)
    assert code == 0 and "untuned model (" not in said
    assert "class=warning" not in (file.parent / "out" / "report.html").read_text()


def test_results_told_by_hand_have_no_quality_to_judge(
    make_spec: MakeSpec, paper: type[PaperTuner]
) -> None:
    spec = make_spec({"budget": 1})
    study = runner.open_study(spec)
    trial = study.ask()
    study.tell(trial, -3.0)
    assert runner.run(spec).exit_code == 0


def test_tune_raises_without_a_completed_trial_and_warns_of_a_useless_one(
    paper: type[PaperTuner], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "train": "tiny:dates-small", "trials": 3}
    paper.failures = list(DIFFERENT)
    with pytest.raises(UserError, match="no trial was completed: 3 failed; trial 2 failed by"):
        tune(**arguments, space=SMALL["space"], output=tmp_path / "failed")
    space = {**SMALL["space"], "learning_rate": [1e-9, 1e-10]}
    with pytest.warns(UserWarning, match="is no better than the untuned model"):
        result = tune(**arguments, space=space, output=tmp_path / "worse")
    assert result.warning is not None and result.adapter is not None
    good = tune(**arguments, space=SMALL["space"], output=tmp_path / "good")
    assert good.warning is None


def test_the_dearer_trial_that_gains_something_is_named() -> None:
    from optuna_lora_rl.study import verdict

    study = optuna.create_study(direction="maximize")
    for quality, cost in ((-0.1, 0.5), (0.2, 9.0)):
        attrs = {"quality": quality, "cost": cost, "score": quality - 0.1 * cost}
        trial = optuna.trial.create_trial(value=attrs["score"], user_attrs=attrs)
        study.add_trial(trial)
    assert verdict.shortfall(study) == (
        "the best adapter, of trial 0, is no better than the untuned model (quality -0.1000, "
        "where the untuned model has 0); trial 1 gains 0.2000, but costs more than that is worth"
    )
