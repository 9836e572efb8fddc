"""How the samplers take every kind of trial: failed, pruned, infeasible, enqueued, added, ..."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from optuna_lora_rl import pruners
from tests.samplers.subjects import FACTORIES
from tests.samplers.subjects import SamplerFactory
from tests.samplers.subjects import params_of
from tests.samplers.subjects import suggest_lora
from tests.samplers.subjects import suggest_plain
from tests.samplers.subjects import tell

SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(0.0, 1.0),
    "y": FloatDistribution(0.0, 1.0),
}


def test_enqueued_parameters_are_taken_whole_or_in_part(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 3)
    whole = {
        "learning_rate": 2e-4,
        "lora_rank": 8,
        "lora_dropout": 0.1,
        "target_modules": "qv",
    }
    study.enqueue_trial(whole)
    study.enqueue_trial({"lora_rank": 5})
    tell(study, suggest_lora, 3)
    assert study.trials[3].params == whole
    assert study.trials[4].params["lora_rank"] == 5
    assert len(study.trials[4].params) == 4


def test_fixed_parameters_are_left_to_their_value(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 5)
    study.sampler = optuna.samplers.PartialFixedSampler(
        {"lora_rank": 7, "target_modules": "mlp"}, study.sampler
    )
    tell(study, suggest_lora, 4)
    for params in params_of(study)[5:]:
        assert (params["lora_rank"], params["target_modules"]) == (7, "mlp")


def violations(make: SamplerFactory, how: str, seed: int) -> int:
    """How many of 20 trials, after 10, lie where they must not; that side looks best."""
    space = {name: FloatDistribution(0.0, 1.0) for name in "vwxy"}
    study = optuna.create_study(sampler=make(seed=seed))
    bad = []
    for _ in range(30):
        trial = study.ask(space)
        v, w, x, y = (trial.params[name] for name in "vwxy")
        bad.append(x > 0.4)
        if how == "constrained":
            trial.set_constraint("x", x - 0.4)
        elif bad[-1]:
            study.tell(trial, state=TrialState.FAIL)
            continue
        study.tell(trial, (v - 0.6) ** 2 + (w - 0.8) ** 2 + (y - 0.3) ** 2 - x)
    return sum(bad[10:])


@pytest.mark.parametrize("how", ["failed", "constrained"])
def test_what_failed_or_violated_a_constraint_is_avoided(make: SamplerFactory, how: str) -> None:
    ours = sum(violations(make, how, seed) for seed in range(2))
    blind = sum(violations(optuna.samplers.RandomSampler, how, seed) for seed in range(2))
    assert ours < 0.6 * blind, (ours, blind)


def test_a_study_in_which_all_failed_goes_on_elsewhere(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    for _ in range(8):
        study.tell(study.ask(SPACE), state=TrialState.FAIL)
    assert len({tuple(params.values()) for params in params_of(study)}) == 8


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, -1e300])
def test_one_absurd_value_does_not_stop_the_search(make: SamplerFactory, value: float) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    for i in range(8):
        trial = study.ask(SPACE)
        study.tell(trial, value if i == 2 else trial.params["x"])
    assert len(study.trials) == 8


def test_equal_values_do_not_stop_the_search(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    for _ in range(8):
        study.tell(study.ask(SPACE), 1.0)
    assert len({tuple(params.values()) for params in params_of(study)}) == 8


def test_objectives_that_return_nan_or_raise_are_failed_and_the_study_goes_on(
    make: SamplerFactory,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        value = suggest_plain(trial)
        if trial.number % 3 == 1:
            raise MemoryError("too large")
        return math.nan if trial.number % 3 == 2 else value

    study = optuna.create_study(sampler=make(seed=0))
    study.optimize(objective, n_trials=9, catch=(MemoryError,))
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL] * 3


def test_a_retried_trial_keeps_its_parameters_and_teaches_nothing_twice(
    make: SamplerFactory,
) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 3)
    killed = study.ask()
    killed.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
    study.tell(killed, state=TrialState.FAIL)
    optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[3])
    tell(study, suggest_lora, 3)
    assert study.trials[4].params["learning_rate"] == study.trials[3].params["learning_rate"]
    assert len(study.trials[4].params) == 4


def test_running_and_waiting_trials_are_left_where_they_are(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 3)
    suggest_lora(study.ask())
    study.ask()  # a zombie without any parameter
    tell(study, suggest_lora, 4)
    study.enqueue_trial({"lora_rank": 4})
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.RUNNING) == 2
    assert states.count(TrialState.WAITING) == 1


def test_trials_added_from_elsewhere_teach(make: SamplerFactory) -> None:
    # Thirty good results at x < 0.2 and thirty bad ones above.
    distances = []
    for seed in range(3):
        study = optuna.create_study(sampler=make(seed=seed))
        for i in range(60):
            x, y = i / 60, (i * 7 % 60) / 60
            value = x if x < 0.2 else 1.0 + x
            study.add_trial(
                optuna.create_trial(params={"x": x, "y": y}, distributions=SPACE, value=value)
            )
        distances += [study.ask(SPACE).params["x"] for _ in range(5)]
    assert sorted(distances)[len(distances) // 2] < 0.4


def test_pruned_trials_with_and_without_reports(make: SamplerFactory) -> None:
    study = optuna.create_study(direction="maximize", sampler=make(seed=0))
    for i in range(10):
        trial = study.ask(SPACE)
        if i % 2:
            for step in range(i // 3):
                trial.report(math.nan if i == 7 else float(step), step)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, trial.params["x"])
    assert len(study.trials) == 10


@pytest.mark.parametrize("name_of_pruner", ["hyperband", "median"])
def test_pruners_and_samplers_work_together(make: SamplerFactory, name_of_pruner: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        value = suggest_lora(trial)
        for step in (10, 20, 30, 40):
            trial.report(value + 1.0 / step, step)
            if trial.should_prune():
                raise optuna.TrialPruned()
        return value

    pruner = pruners.create(name_of_pruner, first_step=10, last_step=40)
    study = optuna.create_study(sampler=make(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=20)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.PRUNED) > 0
    assert states.count(TrialState.COMPLETE) > 0


def test_ranges_steps_and_parameters_may_change_between_runs(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    runs: list[dict[str, BaseDistribution]] = [
        {"learning_rate": FloatDistribution(1e-5, 1e-2, log=True)},
        {
            "learning_rate": FloatDistribution(1e-4, 1e-3, log=True),
            "lora_rank": IntDistribution(2, 8),
        },
        {"lora_rank": IntDistribution(16, 64, step=16), "x": FloatDistribution(0, 1)},
        {"learning_rate": FloatDistribution(1e-1, 1.0, log=True), "x": FloatDistribution(5, 9)},
    ]
    for space in runs:
        for i in range(4):
            trial = study.ask(space)
            for key, distribution in space.items():
                assert distribution._contains(trial.params[key])
            study.tell(trial, float(i))


def test_several_objectives_with_constraints_and_failures(make: SamplerFactory) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=make(seed=0))
    for i in range(14):
        trial = study.ask(SPACE)
        x, y = trial.params["x"], trial.params["y"]
        if i % 5 == 3:
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_constraint("sum", x + y - 1.5)
        study.tell(trial, [x + y, y])
    assert len(study.best_trials) > 0


values = st.one_of(
    st.floats(-1e3, 1e3), st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 1e308, 5e-324])
)
distributions = st.one_of(
    st.tuples(st.floats(-1e3, 1e3), st.floats(1e-6, 1e3)).map(
        lambda pair: FloatDistribution(pair[0], pair[0] + pair[1])
    ),
    st.tuples(st.floats(1e-6, 1.0), st.floats(1.5, 1e4)).map(
        lambda pair: FloatDistribution(pair[0], pair[0] * pair[1], log=True)
    ),
    st.tuples(st.integers(-100, 100), st.integers(0, 100), st.integers(1, 9)).map(
        lambda t: IntDistribution(t[0], t[0] + t[1] * t[2], step=t[2])
    ),
    st.tuples(st.integers(1, 9), st.integers(0, 500)).map(
        lambda pair: IntDistribution(pair[0], pair[0] + pair[1], log=True)
    ),
    st.lists(
        st.one_of(st.integers(-5, 5), st.text(max_size=3), st.none(), st.booleans()),
        min_size=1,
        max_size=6,
        unique_by=repr,
    ).map(CategoricalDistribution),
)
outcomes = st.sampled_from(["complete", "failed", "pruned", "infeasible", "running"])
names = st.sampled_from(["learning_rate", "lora_rank", "alpha", "x", "y", "batch_size"])


@pytest.mark.parametrize("name", FACTORIES)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    space=st.dictionaries(names, distributions, min_size=1, max_size=4),
    told=st.lists(st.tuples(outcomes, values), min_size=4, max_size=7),
)
def test_any_space_and_any_history(
    name: str, space: dict[str, BaseDistribution], told: list[tuple[str, float]]
) -> None:
    study = optuna.create_study(sampler=FACTORIES[name](seed=0))
    for outcome, value in told:
        trial = study.ask(space)
        for key, distribution in space.items():
            internal: Any = distribution.to_internal_repr(trial.params[key])
            assert distribution._contains(internal)
        if outcome == "failed" or (math.isnan(value) and outcome != "pruned"):
            study.tell(trial, state=TrialState.FAIL)
        elif outcome == "pruned":
            trial.report(value, 1)
            study.tell(trial, state=TrialState.PRUNED)
        elif outcome != "running":
            if outcome == "infeasible" and math.isfinite(value):
                trial.set_constraint("c", value)
            study.tell(trial, value)
