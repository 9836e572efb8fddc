"""What counts, who owns a running trial, and when it is time to give up."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from optuna.trial import create_trial

from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import owner as owner_module
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.owner import OWNER
from optuna_lora_rl.study.owner import Owner
from optuna_lora_rl.study.spec import Budget


def failed(reason: str | None, message: str = "") -> optuna.trial.FrozenTrial:
    attrs = {} if reason is None else {"failure": reason, "failure_message": message}
    return create_trial(state=TrialState.FAIL, user_attrs=attrs)


def running(**attrs: object) -> optuna.trial.FrozenTrial:
    return create_trial(state=TrialState.RUNNING, user_attrs=attrs)


@pytest.mark.parametrize(
    ("trial", "counts"),
    [
        (create_trial(value=1.0), True),
        (create_trial(state=TrialState.PRUNED), True),
        (failed("diverged"), True),
        (failed("told"), True),
        (failed("killed"), False),
        (failed("interrupted"), False),
        (failed(None), False),
        (running(), False),
    ],
)
def test_what_counts(trial: optuna.trial.FrozenTrial, counts: bool) -> None:
    assert outcome.counts(trial) == counts


def test_a_killed_trial_is_run_again_once(tmp_path: Path) -> None:
    study = optuna.create_study()
    for _ in range(3):
        with Owner(tmp_path) as owner:
            trial = owner.ask(study)
            trial.suggest_float("x", 0, 1)
        assert outcome.recover(study) == [trial.number]
    first, again, another, *_ = study.trials
    assert again.params == first.params and again.user_attrs["retry_of"] == 0
    assert another.params != first.params


def test_of_two_workers_that_start_together_one_recovers_a_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = optuna.create_study()
    with Owner(tmp_path) as owner:
        owner.ask(study).suggest_float("x", 0, 1)
    recovered: list[list[int]] = []
    is_gone = owner_module.is_gone

    def other_is_faster(trial: optuna.trial.FrozenTrial) -> bool | None:
        gone = is_gone(trial)
        monkeypatch.setattr(owner_module, "is_gone", is_gone)
        recovered.append(outcome.recover(study))
        return gone

    monkeypatch.setattr(owner_module, "is_gone", other_is_faster)
    assert outcome.recover(study) == []
    assert recovered == [[0]]
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_trials_of_other_machines_and_trials_asked_for_by_hand_are_left_alone(
    tmp_path: Path,
) -> None:
    study = optuna.create_study()
    with Owner(tmp_path) as owner:
        elsewhere = owner.ask(study)
    said = elsewhere.user_attrs[OWNER]
    elsewhere.set_user_attr(OWNER, {**said, "host": "elsewhere"})
    study.ask()
    assert outcome.recover(study) == []
    assert all(trial.state == TrialState.RUNNING for trial in study.trials)


@pytest.mark.parametrize(
    ("own", "hopeless"),
    [
        (
            [failed("error", "row 1 of 5 is bad")] + [failed("error", "row 2 of 5 is bad")] * 2,
            True,
        ),
        ([failed("diverged", "loss nan"), *[failed("diverged", "loss inf")] * 2], True),
        ([failed("diverged")] * 2, False),
        ([failed("diverged"), failed("out-of-memory"), failed("diverged")], False),
        ([failed("error", "a"), failed("error", "b"), failed("error", "a")], False),
        ([failed("interrupted")] * 3, False),
    ],
)
def test_three_equal_failures_are_hopeless(own: list, hopeless: bool) -> None:
    assert (outcome.hopeless(own, own) is not None) == hopeless
    assert outcome.hopeless(own, [create_trial(value=1.0), *own]) is None


def test_other_workers_trials_count_as_long_as_they_run() -> None:
    alive = running(owner={"host": "elsewhere"})
    usage = Usage.of([create_trial(value=1.0, user_attrs={"seconds": 1800, "cost": 2.0}), alive])
    assert usage == Usage(trials=1, running=1, hours=0.5, cost=2.0)
    assert usage.exhausted(Budget(trials=2)) == "1 of 2 trials"
    assert usage.exhausted(Budget(trials=3)) is None
    assert usage.exhausted(Budget(trials=None, hours=0.4)) == "30 min of 24 min"
    assert usage.exhausted(Budget(trials=None, cost=2.0)) == "cost 2 of 2"
    assert usage.share(Budget(trials=4, hours=1)) == 0.5


def test_a_budget_says_how_many_trials_there_will_be() -> None:
    usage = Usage(trials=4, running=1, hours=0.5, cost=2.0)
    assert usage.trials_in_all(Budget(trials=20)) == 20
    assert usage.trials_in_all(Budget(trials=None, hours=2)) == 16
    assert usage.trials_in_all(Budget(trials=20, hours=2, cost=5.0)) == 10
    assert usage.trials_in_all(Budget(trials=None, cost=1.0)) == 4
    begun = Usage(trials=0, running=1, hours=0.0, cost=0.0)
    assert begun.trials_in_all(Budget(trials=None, hours=2)) is None
