"""Processes that are killed, interrupted, or run out of disk in the middle of a trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec
from tests.study.conftest import PaperTuner

StudyFile = Callable[..., Path]

# A trial that takes minutes, so that a signal finds it in the middle.
LONG = {"space.max_steps": 5000, "training.evaluations": 2000, "budget": 2}


def start(file: Path, *arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """``optuna-lora-rl run`` in a process of its own, whose files may be limited in size."""
    command = [sys.executable, "-m", "optuna_lora_rl", "run", str(file), *arguments]
    if limit is not None:
        # Set by a process in between: code between fork and exec may hang where threads run.
        # Python ignores SIGXFSZ, so a write fails, as on a full disk, instead of killing.
        set_limit = (
            "import os, resource, sys;"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", set_limit, *command]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_training(process: subprocess.Popen[str], file: Path, trials: int = 1) -> optuna.Study:
    """Waits until all running trials have reported."""
    spec = study_spec.load(file)
    study = None
    for _ in range(600):
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
        if study is None and (spec.folder / "cache").exists():
            study = opening.load_study(spec)
        if study is not None:
            reported = [bool(trial.intermediate_values) for trial in study.get_trials()]
            if sum(reported) >= trials:
                return study
    raise AssertionError("no trial reported")


def test_after_sigkill_the_next_run_marks_the_trial_and_runs_it_again(
    study_file: StudyFile, paper: type[PaperTuner]
) -> None:
    file = study_file(LONG)
    process = start(file)
    study = wait_for_training(process, file)
    killed = study.trials[0].params
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert opening.load_study(study_spec.load(file)).trials[0].state == TrialState.RUNNING

    result = runner.run(study_spec.load(file))
    assert [trial.state.name for trial in result.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert result.study.trials[0].user_attrs["failure"] == "killed"
    assert result.study.trials[1].params == killed
    assert result.study.trials[1].user_attrs["retry_of"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(
    study_file: StudyFile, number: signal.Signals
) -> None:
    file = study_file(LONG)
    process = start(file)
    study = wait_for_training(process, file)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing finished is lost" in output and f"optuna-lora-rl run {file}" in output
    assert "Traceback" not in output + errors
    trials = study.get_trials()
    assert trials[0].state == TrialState.FAIL
    assert trials[0].user_attrs["failure"] == "interrupted"
    assert trials[1].state == TrialState.WAITING


def test_a_killed_pack_loses_the_running_trials_and_runs_them_again(
    study_file: StudyFile, paper: type[PaperTuner]
) -> None:
    file = study_file(LONG | {"packing": 2})
    process = start(file)
    study = wait_for_training(process, file, trials=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = [trial.params for trial in study.get_trials()]

    again = runner.run(study_spec.load(file)).study
    assert [trial.state.name for trial in again.trials] == ["FAIL"] * 2 + ["COMPLETE"] * 2
    assert {trial.user_attrs["failure"] for trial in again.trials[:2]} == {"killed"}
    assert [trial.params for trial in again.trials[2:]] == killed


def test_a_signal_ends_a_pack_cleanly(study_file: StudyFile) -> None:
    file = study_file(LONG | {"packing": 2})
    process = start(file)
    study = wait_for_training(process, file, trials=2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing finished is lost" in output and "Traceback" not in output + errors
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["FAIL"] * 2 + ["WAITING"] * 2
    assert {trial.user_attrs["failure"] for trial in trials[:2]} == {"interrupted"}


def test_a_full_disk_is_one_sentence_and_nothing_finished_is_lost(study_file: StudyFile) -> None:
    file = study_file({"budget": 2})
    first = start(file)
    first.communicate(timeout=120)
    database = study_spec.load(file).folder / "study.db"
    # The database cannot grow by another page.
    process = start(file, "--set", "budget.trials=6", limit=database.stat().st_size)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "full" in errors or "no room" in errors
    study = opening.load_study(study_spec.load(file))
    assert [trial.state.name for trial in study.trials[:2]] == ["COMPLETE", "COMPLETE"]

    process = start(file, "--set", "budget.trials=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "3 of 3 trials" in output


def test_two_workers_make_the_wished_number_together(study_file: StudyFile) -> None:
    file = study_file({"budget": 5, "sampler": "rl"})
    workers = [start(file), start(file)]
    said = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    spec = study_spec.load(file)
    study = opening.load_study(spec)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert len(study.trials) == 5
    assert len({trial.user_attrs["owner"]["pid"] for trial in study.trials}) == 2
    assert study.user_attrs["test"]["trial"] == study.best_trial.number
    assert (spec.folder / "best" / "best.json").exists()
