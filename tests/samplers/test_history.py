from __future__ import annotations

import math

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from optuna_lora_rl import pruners
from optuna_lora_rl.samplers.history import Ledger
from optuna_lora_rl.samplers.history import parameters_of
from optuna_lora_rl.samplers.history import publish
from optuna_lora_rl.samplers.history import read_history
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.memory import UnionSpace

X = {"x": FloatDistribution(0.0, 1.0)}
XY = {**X, "y": FloatDistribution(0.0, 1.0)}


def _add(study: optuna.Study, x: float, **arguments: object) -> None:
    study.add_trial(optuna.create_trial(params={"x": x}, distributions=X, **arguments))


def test_directions_become_larger_is_better() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    _add(study, 0.25, values=[1.0, 2.0])
    history = read_history(study.trials, space_of(X), study.directions)
    assert history.scores.tolist() == [[-1.0, 2.0]]
    assert history.points.tolist() == [[0.25]]


def test_failed_running_and_waiting_trials() -> None:
    study = optuna.create_study()
    _add(study, 0.1, state=TrialState.FAIL)
    study.enqueue_trial({"x": 0.9})
    study.ask().suggest_float("x", 0, 1)
    study.enqueue_trial({"x": 0.7})
    history = read_history(study.trials, space_of(X), study.directions)
    assert history.failed.tolist() == [True, False]
    assert history.running.tolist() == [False, True]
    assert history.points[:, 0].tolist() == [0.1, 0.9]
    assert not history.scored.any()


KILLED, INTERRUPTED = {"failure": "killed"}, {"failure": "interrupted"}


def _bears(trials: list[dict]) -> tuple[list[int], list[int]]:
    study = optuna.create_study()
    for trial in trials:
        _add(study, 0.5, **trial)
    space = space_of(X)
    history = read_history(study.trials, space, study.directions)
    ledger = Ledger()
    for n in range(1, len(trials) + 1):
        grown = ledger.read(study.trials[:n], space, study.directions)
    assert grown.numbers.tolist() == history.numbers.tolist()
    assert grown.turns.tolist() == history.turns.tolist()
    return history.numbers.tolist(), history.turns.tolist()


def test_trials_that_their_process_cut_short_are_no_evidence() -> None:
    fail, done = {"state": TrialState.FAIL}, {"value": 1.0}
    retry = {"user_attrs": {"retry_of": 0}}
    killed = fail | {"user_attrs": KILLED}
    assert _bears([killed, done | retry]) == ([1], [0])
    assert _bears([done, fail | {"user_attrs": INTERRUPTED}, done, fail]) == ([0, 2, 3], [0, 1, 2])
    # Killed once more, it may be what kills the process.
    assert _bears([killed, fail | {"user_attrs": KILLED | {"retry_of": 0}}]) == ([1], [0])
    # Another worker noticed the silence of a dead one; Optuna's callback says so its own way.
    assert _bears([fail, done | retry]) == ([1], [0])
    optunas = {"system_attrs": {"failed_trial": 1, "retry_history": [1]}}
    assert _bears([done, fail, done | optunas]) == ([0, 2], [0, 1])
    # What came to a result is evidence, whoever repeats it.
    assert _bears([done, done | retry]) == ([0, 1], [0, 1])
    assert _bears([fail | {"user_attrs": {"failure": "out-of-memory"}}, done]) == ([0, 1], [0, 1])


def test_a_proposal_is_seen_before_the_objective_suggests_it() -> None:
    study = optuna.create_study(storage="sqlite://")
    trial = study.ask()
    long_name = "y" * 3000
    publish(study._storage, trial._trial_id, {"x": 0.5, long_name: 1})
    running = study.trials[0]
    assert parameters_of(running) == {"x": 0.5, long_name: 1}
    history = read_history([running], space_of(X), study.directions)
    assert history.running.tolist() == [True]
    assert len(read_history([running], space_of(X), study.directions, current=0)) == 0


def test_a_second_shorter_proposal_replaces_the_first() -> None:
    study = optuna.create_study(storage="sqlite://")
    trial = study.ask()
    for name, x in (("y" * 3000, 0.5), ("y", 0.25)):
        publish(study._storage, trial._trial_id, {"x": x, name: 1})
    assert parameters_of(study.trials[0]) == {"x": 0.25, "y": 1}


def test_half_written_proposals_are_ignored() -> None:
    study = optuna.create_study()
    trial = study.ask()
    study._storage.set_trial_system_attr(
        trial._trial_id, "optuna_lora_rl:relative_params:0", '{"x": 0.'
    )
    assert parameters_of(study.trials[0]) == {}


def test_trials_of_another_space_are_left_out_and_absent_parameters_are_nan() -> None:
    study = optuna.create_study()
    _add(study, 0.3, value=1.0)
    study.add_trial(optuna.create_trial(value=2.0))
    history = read_history(study.trials, space_of(XY), study.directions)
    assert len(history) == 1
    assert math.isnan(history.points[0, 1])


def test_a_pruned_trial_is_judged_at_its_own_step() -> None:
    """Its last report is better than every final loss, yet it was worst at its step."""
    study = optuna.create_study()
    for final in (1.0, 2.0, 3.0):
        _add(study, 0.5, value=final, intermediate_values={0: final / 10, 1: final})
    _add(study, 0.6, value=None, state=TrialState.PRUNED, intermediate_values={0: 0.9})
    _add(study, 0.7, value=None, state=TrialState.PRUNED)
    history = read_history(study.trials, space_of(X), study.directions)
    assert history.scores[3, 0] == -3.0
    assert history.failed.tolist() == [False, False, False, False, True]


def test_violations_add_up() -> None:
    study = optuna.create_study()
    trial = study.ask(X)
    trial.set_constraint("memory", 2.0)
    trial.set_constraint("time", -1.0)
    study.tell(trial, 0.0)
    assert read_history(study.trials, space_of(X), study.directions).violation.tolist() == [2.0]


def test_a_pruned_trial_of_two_objectives_has_a_score_in_each() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for quality, cost in ((1.0, 0.5), (2.0, 1.0), (3.0, 1.5), (None, 0.5), (None, 0.5)):
        trial = study.ask(X)
        if quality is not None:
            pruners.report(trial, (quality / 2, cost), 1)
            study.tell(trial, (quality, cost))
            continue
        if trial.number == 3:
            pruners.report(trial, (0.9, cost), 1)
        study.tell(trial, state=TrialState.PRUNED)
    history = read_history(study.trials, space_of(X), study.directions)
    # Better than one of three at its step in quality, and as cheap as the cheapest.
    assert 1.0 < history.scores[3, 0] < 2.0 and history.scores[3, 1] == -0.5
    assert history.failed.tolist() == [False, False, False, False, True]


def test_a_ledger_reads_as_if_for_the_first_time() -> None:
    """Whatever happens between two reads: trials end, fail, are added, begin, or change place."""
    study = optuna.create_study()
    other = optuna.create_study()
    ledger, union = Ledger(), UnionSpace()

    def same(told: optuna.Study, trials: list[optuna.trial.FrozenTrial]) -> None:
        space = space_of(union.read(trials, -1))
        fresh: dict = {}
        for trial in trials:
            if trial.state != TrialState.WAITING:
                fresh.update(trial.distributions)
        assert space == space_of(fresh)
        seen = ledger.read(trials, space, told.directions)
        for name, array in vars(read_history(trials, space, told.directions)).items():
            np.testing.assert_array_equal(getattr(seen, name), array, err_msg=name)

    def trials() -> list[optuna.trial.FrozenTrial]:
        return study.get_trials(deepcopy=False)

    running = []
    for i in range(70):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        if i > 20:
            trial.suggest_categorical("c", ["a", "b"])
        if i % 3 == 0:
            trial.set_constraint("limit" if i < 40 else "other", i - 30.0)
        trial.report(float(i), step=i % 4)
        if i % 5 == 4:
            running.append(trial)
        else:
            state = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)[i % 7 % 3]
            study.tell(trial, float(i) if state == TrialState.COMPLETE else None, state)
        if i % 11 == 10:
            study.tell(running.pop(0), 1.0)
        if i % 13 == 12:
            study.enqueue_trial({"x": 0.5})
        if i == 50:
            other.optimize(lambda trial: trial.suggest_float("x", 0, 2), n_trials=60)
            same(other, other.get_trials(deepcopy=False))
        same(study, trials())
    same(study, trials()[::2])
    same(study, trials()[::-1])
