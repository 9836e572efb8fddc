"""What a study has taught, and where its trials came from."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
import torch

import optuna_lora_rl
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.samplers import PROPOSAL_KEY
from optuna_lora_rl.samplers.explanation import explain
from optuna_lora_rl.samplers.explanation import origin
from optuna_lora_rl.samplers.explanation_figure import log_ticks


def steep(trial: optuna.Trial) -> float:
    """The learning rate is nearly everything, the targets a little, the dropout nothing."""
    rate = math.log10(trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True))
    trial.suggest_float("lora_dropout", 0.0, 0.3)
    worse = 0.3 * (trial.suggest_categorical("target_modules", ["qv", "all-linear"]) == "qv")
    return 3.0 + (rate + 3) ** 2 + worse


def studied(direction: str, trials: int = 30) -> optuna.Study:
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    sign = 1.0 if direction == "minimize" else -1.0
    study.optimize(lambda trial: sign * steep(trial), n_trials=trials)
    return study


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_what_matters_comes_first_and_is_predicted_in_the_objectives_units(
    direction: str, sign: float
) -> None:
    found = explain(studied(direction))
    assert [p.name for p in found.parameters] == [
        "learning_rate",
        "target_modules",
        "lora_dropout",
    ]
    rate, targets, dropout = found.parameters
    assert rate.importance > 0.5 > 3 * dropout.importance
    assert sum(p.importance for p in found.parameters) == pytest.approx(1)
    # The minimum of the predicted curve lies where that of the objective does.
    lowest = rate.values[int(np.argmin(sign * rate.mean))]
    assert math.log10(lowest) == pytest.approx(-3, abs=0.25)
    best = sign * np.min(sign * rate.mean)
    assert best == pytest.approx(sign * 3.0, abs=0.2)
    assert (rate.low < rate.mean).all() and (rate.mean < rate.high).all()
    assert set(targets.values) == {"qv", "all-linear"} and targets.best == "all-linear"
    assert len(rate.trials) == 30
    assert rate.prior is not None and rate.prior.max() == 1.0


def test_importance_is_what_the_dashboard_shows() -> None:
    from optuna_dashboard._importance import get_param_importance_from_trials_cache
    from optuna_dashboard._inmemory_cache import InMemoryCache

    for direction in ("minimize", "maximize"):
        study = studied(direction)
        shown = get_param_importance_from_trials_cache(
            InMemoryCache(), study._storage, study._study_id, 0, study.trials
        )
        found = {p.name: p.importance for p in explain(study).parameters}
        assert found == pytest.approx({row["name"]: row["importance"] for row in shown})


def test_a_pruned_trial_stands_at_what_it_had_when_it_was_pruned() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    for number in range(8):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        trial.report(-0.12 if number == 7 else x - 1, 1)
        if number == 7:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, x)
    (parameter,) = explain(study).parameters
    assert parameter.pruned == ((pytest.approx(study.trials[7].params["x"]), -0.12),)
    assert [value for _, value in parameter.trials] == [t.value for t in study.trials[:7]]


def test_the_best_trial_keeps_the_constraints_where_any_does() -> None:
    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
        trial.set_constraint("memory", rate - 1e-3)
        return rate

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(objective, n_trials=12)
    (rate,) = explain(study).parameters
    assert rate.best == study.best_params["learning_rate"] <= 1e-3


def test_the_band_holds_what_was_not_measured() -> None:
    study = studied("minimize", trials=15)
    found = explain(study)
    rate = next(p for p in found.parameters if p.name == "learning_rate")
    best = study.best_params
    truth = [
        steep(optuna.trial.FixedTrial(best | {"learning_rate": value}))  # type: ignore[arg-type]
        for value in rate.values
    ]
    near = [k for k, value in enumerate(truth) if value < 6]
    held = [rate.low[k] - 0.1 <= truth[k] <= rate.high[k] + 0.1 for k in near]
    assert np.mean(held) > 0.8


def test_few_results_teach_nothing_and_failures_are_no_results() -> None:
    study = optuna.create_study()
    for _ in range(2):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    failed = study.ask()
    failed.suggest_float("x", 0, 1)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    assert explain(study).parameters == ()
    assert explain(optuna.create_study()).parameters == ()


def test_a_constant_objective_leaves_nothing_to_explain() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: 0.0 * trial.suggest_float("x", 0, 1), n_trials=5)
    (parameter,) = explain(study).parameters
    assert parameter.importance == 0 and np.allclose(parameter.mean, 0)


def test_trials_say_where_they_came_from() -> None:
    study = optuna.create_study(sampler=optuna_lora_rl.RLSampler(seed=0))
    study.enqueue_trial({"learning_rate": 1e-3})
    study.optimize(steep, n_trials=4)
    study.add_trial(
        optuna.create_trial(
            params={"learning_rate": 1e-4},
            distributions={"learning_rate": study.trials[0].distributions["learning_rate"]},
            value=5.0,
        )
    )
    found = explain(study)
    assert str(found.origins[0]) == "enqueued by hand"
    assert found.origins[2].expected is not None and "deviations" in str(found.origins[2])
    assert str(found.origins[4]) == "proposed by another sampler"
    assert "learning_rate" in str(found) and "trial 4: proposed by another" in str(found)


def test_what_a_proposal_kept_is_put_into_words() -> None:
    kept = {"source": "improvement", "mean": 1.25, "std": 0.9, "log_feasible": math.log(0.4)}
    trial = optuna.create_trial(value=0.0, system_attrs={PROPOSAL_KEY: kept | {"network": -0.7}})
    said = str(origin(trial))
    assert said.startswith("the most promising place by the surrogate; expected +1.2 ± 0.9")
    assert said.endswith("(little is known there, 40% likely to work, the network gave -0.7)")


def test_the_second_of_two_objectives() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(lambda t: (t.suggest_float("x", 0, 1), -t.suggest_float("y", 0, 1)), n_trials=9)
    assert explain(study).parameters[0].name == "x"
    assert explain(study, objective=1).parameters[0].name == "y"
    with pytest.raises(UserError, match="objective is 2, but must be between 0 and 1"):
        explain(study, objective=2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", [1.0, 1e300, math.inf])
def test_no_device_and_no_value_stops_it(unit: float) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(9):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1) + 0 * trial.suggest_float("y", 0, 1)
        study.tell(trial, (1 + x) * (math.inf if number % 3 == 2 else unit))
    torch.set_default_device("meta")
    try:
        found = explain(study)
    finally:
        torch.set_default_device(None)
    assert {p.name for p in found.parameters} == (set() if math.isinf(unit) else {"x", "y"})
    for parameter in found.parameters:
        assert np.isfinite(parameter.mean).all()
        assert all(math.isfinite(value) for _, value in parameter.trials)


def test_a_notebook_shows_a_table_and_no_arrays() -> None:
    found = explain(studied("minimize"))
    assert repr(found) == str(found) and "array" not in repr(found)
    page = found._repr_html_()
    shares = [f"<td>{p.name}</td><td>{p.importance:.0%}</td>" for p in found.parameters]
    assert all(share in page for share in shares)
    assert "Where each of the 30 trials came from" in page

    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("<b>x", 0, 1), n_trials=4)
    assert "<b>" not in explain(study)._repr_html_()


def test_the_figure_has_a_panel_for_each_parameter() -> None:
    figure = explain(studied("minimize")).figure()
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[0].startswith("learning_rate · ") and len(titles) == 3
    assert {"trials", "usual in LoRA runs"} <= {trace.name for trace in figure.data}


def test_ticks_are_round_and_inside() -> None:
    assert log_ticks(1e-4, 3e-2) == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    assert log_ticks(4, 100) == pytest.approx([5, 10, 20, 50, 100])
    assert log_ticks(1e-6, 1) == pytest.approx([10.0**k for k in range(-6, 1)])
