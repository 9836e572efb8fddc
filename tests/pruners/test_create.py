from __future__ import annotations

import pickle
import warnings
from typing import Any

import optuna
import pytest

from optuna_lora_rl import pruners
from optuna_lora_rl.errors import UserError

STEPS = (10, 20, 30, 40)
NEEDED: dict[str, dict[str, Any]] = {"threshold": {"lower": -1.0}}


def run(pruner: optuna.pruners.BasePruner, qualities: list[float]) -> list[int]:
    """Tune trials that rise towards ``qualities``; returns each trial's last step."""
    study = optuna.create_study(direction="maximize", pruner=pruner, study_name="pruned")

    def objective(trial: optuna.Trial) -> float:
        for step in STEPS:
            trial.report(qualities[trial.number] * step / STEPS[-1], step)
            if trial.should_prune():
                raise optuna.TrialPruned()
        return qualities[trial.number]

    study.optimize(objective, n_trials=len(qualities))
    return [trial.last_step or 0 for trial in study.trials]


@pytest.mark.parametrize("name", [name for name in pruners.NAMES if name != "pareto"])
def test_every_pruner_serves_a_study_and_can_be_pickled(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        pruner = pruners.create(name, NEEDED.get(name))
    last_steps = run(pickle.loads(pickle.dumps(pruner)), [1.0, 0.9, 0.8, 0.7, 0.6, -9.0])
    assert last_steps[0] == STEPS[-1]
    if name == "none":
        assert last_steps == [STEPS[-1]] * 6


@pytest.mark.parametrize("name", ["median", "percentile", "threshold", "successive-halving"])
def test_a_hopeless_trial_is_stopped_at_its_first_evaluation(name: str) -> None:
    pruner = pruners.create(name, NEEDED.get(name), first_step=STEPS[0], last_step=STEPS[-1])
    assert run(pruner, [1.0, 1.1, 1.2, 1.3, 1.4, -9.0])[-1] == STEPS[0]


def test_options_reach_the_pruner() -> None:
    qualities = [1.0, 1.1, 1.2, 1.3, 1.4, -9.0]
    assert run(pruners.create("median", {"n_warmup_steps": 30}), qualities)[-1] == 30
    assert run(pruners.create("median", {"n_startup_trials": 6}), qualities)[-1] == 40


def test_median_waits_for_three_trials_at_the_very_same_step() -> None:
    study = optuna.create_study(direction="maximize", pruner=pruners.create("median"))
    for step in (8, 8, 10, 12, 14):
        study.add_trial(optuna.create_trial(value=1.0, intermediate_values={step: 1.0, 40: 1.0}))
    trial = study.ask()
    trial.report(0.0, 8)
    assert not trial.should_prune()
    trial.report(0.0, 40)
    assert trial.should_prune()


def test_the_first_rung_is_the_first_evaluation_where_the_study_knows_it() -> None:
    # A middling trial survives one halving at its first report; with Optuna's own rungs at steps
    # 1, 2, 4 and 8 it would have to win four at once.
    qualities = [1.0, 0.1, 0.2, 0.3, 0.9]
    known = pruners.create("successive-halving", first_step=10, last_step=40)
    unknown = pruners.create("successive-halving", {"min_resource": 1})
    assert run(known, qualities)[-1] > run(unknown, qualities)[-1] == 10


def test_patient_wraps_another_pruner_by_name() -> None:
    wrapped = {"name": "threshold", "lower": 0.0}
    # A falling trial: the threshold alone would stop it at once, patience waits for two reports.
    alone = pruners.create("threshold", {"lower": 0.0})
    patient = pruners.create("patient", {"wrapped_pruner": wrapped, "patience": 1})
    assert run(alone, [-4.0]) == [10]
    assert run(patient, [-4.0]) == [30]
    assert run(pruners.create("patient", {"wrapped_pruner": "none"}), [-4.0]) == [40]
    assert run(pruners.create("patient", {"wrapped_pruner": None}), [-4.0]) == [30]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("medain", {}, ["'medain'", "did you mean 'median'", "hyperband"]),
        (None, {}, ["None", "median"]),
        (["median"], {}, ["median"]),
        ("median", {"n_startup_trial": 3}, ["'n_startup_trial'", "mean 'n_startup_trials'"]),
        ("median", {"n_startup_trials": "five"}, ["'five'", "whole number"]),
        ("median", {"n_startup_trials": 2.5}, ["2.5", "whole number"]),
        ("median", {"n_warmup_steps": True}, ["True", "whole number"]),
        ("median", {"interval_steps": 0}, ["interval_steps", "0", "at least 1"]),
        ("median", [3], ["[3]", "mapping"]),
        ("percentile", {"percentile": 120}, ["120", "between 0 and 100"]),
        ("percentile", {"percentile": float("nan")}, ["nan", "number"]),
        ("none", {"patience": 1}, ["'patience'", "none"]),
        ("threshold", {}, ["lower", "upper"]),
        ("threshold", {"lower": 2, "upper": 1}, ["lower", "upper"]),
        ("hyperband", {"min_resource": 0}, ["min_resource", "at least 1"]),
        ("hyperband", {"min_resource": 50, "max_resource": 40}, ["40", "min_resource 50"]),
        ("hyperband", {"max_resource": "all"}, ["max_resource", "all", "auto"]),
        ("successive-halving", {"reduction_factor": 1}, ["reduction_factor", "at least 2"]),
        ("successive-halving", {"min_resource": "no"}, ["min_resource", "auto"]),
        ("wilcoxon", {"p_threshold": 2}, ["p_threshold", "between 0 and 1"]),
        ("patient", {"wrapped_pruner": "halving"}, ["patient", "'halving'"]),
        ("patient", {"wrapped_pruner": {"lower": 1}}, ["patient", "'name'"]),
        ("patient", {"wrapped_pruner": "pareto"}, ["patient", "'pareto'"]),
        ("async-halving", {"noise": -1}, ["noise", "-1", "at least 0"]),
        ("async-halving", {"reduction_factor": 1}, ["reduction_factor", "at least 2"]),
        ("async-halving", {"min_resource": "all"}, ["min_resource", "'all'", "'auto'"]),
        ("peer-median", {"noise": "none"}, ["noise", "'none'", "'auto'"]),
        ("peer-median", {"percentil": 20}, ["'percentil'", "mean 'percentile'"]),
        ("cost-aware", {"probability": 2}, ["probability", "between 0 and 1"]),
        ("cost-aware", {"last_step": 0}, ["last_step", "at least 1"]),
        ("pareto", {"probability": 0.9}, ["pareto", "probability", "0.5"]),
        ("patient", {"wraped": "median"}, ["'wraped'", "mean 'wrapped_pruner'"]),
    ],
)
def test_bad_input_is_one_sentence(name: Any, options: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        pruners.create(name, options)
    sentence = str(caught.value)
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence


def test_a_number_that_yaml_reads_as_a_text_is_a_number() -> None:
    assert pruners.create("patient", {"min_delta": "1e-3"})._min_delta == 1e-3  # type: ignore[attr-defined]


def test_several_objectives_are_for_pareto_or_nobody() -> None:
    pruners.check("none", n_objectives=2)
    pruners.check("median", n_objectives=1)
    with pytest.raises(UserError, match=r"'median' cannot be used with 2 objectives.*'pareto'"):
        pruners.check("median", n_objectives=2)


def test_pareto_needs_several_objectives() -> None:
    pruners.check("pareto", n_objectives=2)
    with pytest.raises(UserError, match=r"'pareto' needs several objectives.*'cost-aware'"):
        pruners.check("pareto", n_objectives=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("median", {"n_warmup_steps": 30}),
        ("peer-median", {"n_warmup_steps": 30}),
        ("successive-halving", {"min_resource": 4}),
        ("async-halving", {"min_resource": 4}),
    ],
)
def test_a_pruner_that_would_wait_for_the_end_is_refused(
    name: str, options: dict[str, Any]
) -> None:
    pruners.check(name, options)
    pruners.check(name, options, evaluations=50)
    with pytest.raises(UserError, match="less than 4: a step is an evaluation"):
        pruners.check(name, options, evaluations=4)


@pytest.mark.parametrize(("name", "objectives"), [("cost-aware", 1), ("pareto", 2)])
def test_a_forecast_needs_two_evaluations_before_the_last(name: str, objectives: int) -> None:
    pruners.check(name, n_objectives=objectives, evaluations=3)
    with pytest.raises(UserError, match="only 2 in all"):
        pruners.check(name, n_objectives=objectives, evaluations=2)


def test_wilcoxon_needs_enough_evaluations_to_be_sure_before_the_end() -> None:
    pruners.check("wilcoxon", evaluations=5)
    with pytest.raises(UserError, match="4 evaluations"):
        pruners.check("wilcoxon", evaluations=4)
    with pytest.raises(UserError, match="5 evaluations"):
        pruners.check("wilcoxon", {"p_threshold": 0.05}, evaluations=5)
    # What the check promises: five evaluations can be stopped at the fourth.
    study = optuna.create_study(direction="maximize", pruner=pruners.create("wilcoxon"))
    study.add_trial(
        optuna.create_trial(value=1.0, intermediate_values=dict.fromkeys(range(5), 1.0))
    )
    trial = study.ask()
    decisions = []
    for step in range(5):
        trial.report(0.1 * step, step)
        decisions.append(trial.should_prune())
    assert decisions == [False, False, False, True, True]
