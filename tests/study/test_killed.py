"""Workers that are killed or outlived: nothing is lost, counted twice or left running."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import text
from typer.testing import CliRunner

from optuna_lora_rl.cli import app
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import heartbeat
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import trials as trials_module
from optuna_lora_rl.study.spec import StudySpec
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

pytestmark = pytest.mark.usefixtures("paper")


def in_a_process(work: Callable[[], Any], *, wait: bool = True) -> int:
    """Does it in a child; returns the child's number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    if wait:
        os.waitpid(child, 0)
    return child


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(owner: Any, name: str, spec: StudySpec, *, after: bool = False) -> None:
    """Runs the study in a process that is killed where it calls ``owner.name``."""

    def work() -> None:
        original = getattr(owner, name)

        def last(*given: Any, **named: Any) -> None:
            if after:
                original(*given, **named)
            die()

        setattr(owner, name, last)
        runner.run(spec)

    in_a_process(work)


def check(spec: StudySpec, budget: int) -> list[str]:
    """Runs the study to its end, and returns its trials' states."""
    study = runner.run(spec).study
    states = [trial.state.name for trial in study.trials]
    assert "RUNNING" not in states and states.count("COMPLETE") == budget, states
    assert (spec.folder / "report.html").read_text().rstrip().endswith("</html>")
    assert adapters.best_number(spec.folder) == study.best_trial.number
    hidden = {path.name for path in spec.folder.iterdir() if path.name.startswith(".")}
    assert hidden <= {".study", ".lock"}
    return states


@pytest.mark.parametrize("packing", ["off", 2])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (heartbeat.Heartbeat, "begins"),
        (trials_module, "propose"),
        (trials_module.Trials, "_record"),
        (trials_module.Trials, "_forget"),
        (adapters, "drop_others"),
        (adapters, "publish_best"),
        (report, "write"),
    ],
)
def test_wherever_it_is_killed_the_next_run_completes_the_study(
    make_spec: MakeSpec, owner: Any, name: str, packing: str | int
) -> None:
    spec = make_spec({"packing": packing})
    killed_at(owner, name, spec)
    before = [t for t in opening.load_study(spec).trials if t.state == TrialState.COMPLETE]
    check(spec, budget=3)
    after = {trial.number: trial for trial in opening.load_study(spec).trials}
    assert [after[trial.number] for trial in before] == before


def test_a_trial_that_was_asked_for_by_hand_goes_on_running(make_spec: MakeSpec) -> None:
    spec = make_spec()
    asked = CliRunner().invoke(app, ["ask", str(spec.folder.parent / "small.yaml")])
    assert asked.exit_code == 0, asked.output
    killed_at(heartbeat.Heartbeat, "begins", spec)
    states = [trial.state.name for trial in runner.run(spec).study.trials]
    assert states == ["RUNNING", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_a_clock_that_jumps_kills_no_running_trial(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, paper: type[PaperTuner]
) -> None:
    spec = make_spec()
    monkeypatch.setattr(paper, "run", lambda *_, **__: time.sleep(60))
    child = in_a_process(lambda: runner.run(spec), wait=False)
    try:
        study = _once_running(spec)
        # The kernel tells the start of the machine by the wall clock: it moves with it.
        start = psutil.boot_time()
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: start + 5)
        assert outcome.recover(study) == []
        assert study.trials[0].state == TrialState.RUNNING
    finally:
        os.kill(child, signal.SIGKILL)
    # Ended, and not yet waited for by its parent: a process in name only.
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert outcome.recover(study) == [0]
    os.waitpid(child, 0)


def _once_running(spec: StudySpec) -> optuna.Study:
    for _ in range(600):
        time.sleep(0.1)
        try:
            study = opening.open_study(spec)
        except UserError:
            continue
        if study.trials and study.trials[0].params:
            return study
    raise AssertionError("no trial began")


def delete_row(spec: StudySpec, number: int) -> None:
    storage = RDBStorage(spec.storage_url)
    with storage.engine.begin() as connection:
        where = f"(SELECT trial_id FROM trials WHERE number = {number})"
        for table in ("trial_params", "trial_values", "trial_user_attributes"):
            connection.execute(text(f"DELETE FROM {table} WHERE trial_id IN {where}"))
        connection.execute(text(f"DELETE FROM trials WHERE number = {number}"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_study_whose_row_was_deleted_goes_on(make_spec: MakeSpec, number: int) -> None:
    study = runner.run(make_spec()).study
    kept = {trial.number: trial.params for trial in study.trials if trial.number != number}
    delete_row(make_spec(), number)
    file = str(make_spec().folder.parent / "small.yaml")
    for command in (["status"], ["best"], ["explain", "--trial", "2"], ["report", "--trial", "2"]):
        done = CliRunner().invoke(app, [command[0], file, *command[1:]])
        assert done.exit_code == 0, done.output
    after = runner.run(make_spec({"budget": 5})).study
    states = {trial.number: trial.state.name for trial in after.trials}
    done_ones = {**dict.fromkeys(range(6), "COMPLETE"), number: "FAIL"}
    assert states == done_ones
    assert {n: after.trials[n].params for n in kept} == kept
    assert after.trials[number].user_attrs["failure"] == "deleted"
    assert not CliRunner().invoke(app, ["export", file, "-o", file + ".out"]).exit_code


def test_trials_that_got_one_number_are_told_apart_again(make_spec: MakeSpec) -> None:
    study = runner.run(make_spec({"budget": 4})).study
    first, study_id = study.trials, study._study_id
    delete_row(make_spec({"budget": 4}), 1)
    # As Optuna itself would go on: with the number of the last trial.
    storage = RDBStorage(make_spec().storage_url)
    twin = optuna.trial.create_trial(
        value=9.0, params=first[3].params, distributions=first[3].distributions
    )
    storage.create_new_trial(study_id, twin)
    assert [trial.number for trial in storage.get_all_trials(study_id)] == [0, 2, 3, 3]
    after = runner.run(make_spec({"budget": 6})).study
    assert [trial.number for trial in after.trials] == list(range(6))
    assert sorted(trial.value for trial in after.trials[:4]) == sorted(
        [9.0, *(trial.value for trial in first if trial.number != 1)]
    )


def test_the_first_of_two_workers_says_what_still_runs(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, paper: type[PaperTuner]
) -> None:
    spec = make_spec()
    monkeypatch.setattr(paper, "run", lambda *_, **__: time.sleep(60))
    child = in_a_process(lambda: runner.run(spec), wait=False)
    try:
        _once_running(spec)
        monkeypatch.undo()
        paper_module = sys.modules["optuna_lora_rl.finetuning.finetuner"]
        monkeypatch.setattr(paper_module, "FineTuner", PaperTuner)
        done = CliRunner().invoke(app, ["run", str(spec.folder.parent / "small.yaml")])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "2 of 3 trials are finished, 1 runs in another worker" in said
    assert "Finished" not in said
    # The best so far is there in case that the other one is lost.
    assert (spec.folder / "best" / "best.json").exists()
    assert check(spec, budget=3).count("FAIL") == 1


def test_four_workers_on_one_folder_end_well(make_spec: MakeSpec) -> None:
    spec = make_spec({"budget": 12, "sampler": "random"})
    opening.open_study(spec)
    children = [
        in_a_process(lambda: os._exit(0 if runner.run(spec) else 1), wait=False) for _ in range(4)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0, 0]
    study = opening.load_study(spec)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
    check(spec, budget=12)
