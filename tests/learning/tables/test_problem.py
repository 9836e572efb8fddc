from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.problem import DEFAULTS
from optuna_lora_rl.learning.tables.problem import TableProblem
from optuna_lora_rl.learning.tables.problem import undominated
from optuna_lora_rl.learning.tables.surfaces import Surfaces
from tests.learning.tables.conftest import NAMES
from tests.learning.tables.conftest import places
from tests.learning.tables.conftest import truth

TASK = NAMES[0]


def study_of(problem: TableProblem, trials: int, **named: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=problem.directions, sampler=optuna.samplers.RandomSampler(seed=0), **named
    )
    study.optimize(problem, n_trials=trials)
    return study


def test_a_study_runs_on_it_and_regret_is_normalised(fitted: Surfaces) -> None:
    problem = TableProblem(TASK, shipped=fitted)
    study = study_of(problem, 100)
    assert list(study.trials[0].params) == list(problem.search_space)
    regrets = [problem.regret(value) for value in (trial.value for trial in study.trials)]
    assert -1e-9 <= min(regrets) < 0.6
    assert 0.6 < statistics.median(regrets) < 1.4
    assert problem.regret(problem.evaluate(problem.best_params)) == pytest.approx(0.0)


def test_it_has_the_shape_of_an_optunahub_problem(fitted: Surfaces) -> None:
    problem = TableProblem(TASK, tuned=["lora_rank"], shipped=fitted)
    assert problem.directions == [optuna.study.StudyDirection.MAXIMIZE]
    assert list(problem.search_space) == ["lora_rank"]
    trial = optuna.create_study(directions=problem.directions).ask(problem.search_space)
    assert problem(trial) == problem.evaluate(trial.params)


def test_the_score_is_quality_minus_weighted_cost(fitted: Surfaces) -> None:
    wanted = {**DEFAULTS, "learning_rate": 3e-3, "lora_rank": 5}
    x = places([wanted])
    for weight in (0.0, 0.3):
        problem = TableProblem(TASK, cost_weight=weight, shipped=fitted)
        quality, cost = float(fitted.quality(x)[0, 0]), float(fitted.cost(x)[0, 0])
        assert problem.evaluate(wanted) == pytest.approx(quality - weight * cost)


def test_the_front_holds_the_best_trade_off_at_every_weight(fitted: Surfaces) -> None:
    tuned = ["learning_rate", "lora_rank", "target_modules", "batch_size"]
    front = TableProblem(TASK, tuned=tuned, failures=True, shipped=fitted).front
    cost, quality = front.T
    assert (np.diff(cost) > 0).all() and (np.diff(quality) > 0).all()
    for weight in (0.0, 0.1, 0.5):
        of = TableProblem(TASK, tuned=tuned, cost_weight=weight, failures=True, shipped=fitted)
        assert abs(of.regret(float((quality - weight * cost).max()))) < 0.02


def test_only_the_undominated_are_left() -> None:
    losses = np.array([[2.0, 1.0], [1.0, 2.0], [2.0, 2.0], [1.0, 2.0], [0.0, 3.0], [3.0, 1.0]])
    assert losses[undominated(losses)].tolist() == [[0.0, 3.0], [1.0, 2.0], [2.0, 1.0]]


def test_some_parameters_can_be_tuned_and_ranges_narrowed(fitted: Surfaces) -> None:
    problem = TableProblem(
        TASK,
        tuned=["learning_rate", "lora_rank", "target_modules"],
        fixed={"max_steps": 64},
        ranges={"learning_rate": (1e-3, 1e-2), "target_modules": ("qv", "mlp")},
        shipped=fitted,
    )
    assert problem.search_space == {
        "learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
        "lora_rank": IntDistribution(1, 64, log=True),
        "target_modules": CategoricalDistribution(("qv", "mlp")),
    }
    params = {"learning_rate": 2e-3, "lora_rank": 4, "target_modules": "qv"}
    whole = TableProblem(TASK, shipped=fitted)
    assert problem.evaluate(params) == whole.evaluate({**DEFAULTS, "max_steps": 64, **params})
    assert set(problem.best_params) == set(params)


def test_a_shift_moves_the_scale_and_nothing_else(fitted: Surfaces) -> None:
    plain = TableProblem(TASK, tuned=["learning_rate"], shipped=fitted)
    moved = TableProblem(
        TASK, tuned=["learning_rate"], shift={"learning_rate": 0.01}, shipped=fitted
    )
    assert moved.evaluate({"learning_rate": 2e-5}) == pytest.approx(
        plain.evaluate({"learning_rate": 2e-3})
    )
    there = moved.search_space["learning_rate"]
    assert isinstance(there, FloatDistribution)
    assert (there.low, there.high) == pytest.approx((5e-7, 1e-3))
    assert moved.best == pytest.approx(plain.best)


def test_noise_is_that_of_the_seeds(fitted: Surfaces) -> None:
    noisy = replace(fitted, noise=torch.tensor([0.05, 0.0]).double())
    problem = TableProblem(TASK, noise=True, seed=1, shipped=noisy)
    scores = [problem.evaluate(DEFAULTS) for _ in range(400)]
    assert 0.04 < statistics.stdev(scores) < 0.06
    again = TableProblem(TASK, noise=True, seed=1, shipped=noisy)
    assert [again.evaluate(DEFAULTS) for _ in range(400)] == scores
    quiet = TableProblem(TASK, shipped=noisy)
    assert quiet.evaluate(DEFAULTS) == quiet.evaluate(DEFAULTS)


def test_diverging_runs_fail_where_that_is_wanted(fitted: Surfaces) -> None:
    failing = TableProblem(TASK, failures=True, shipped=fitted)
    drawn = design.configurations(120)
    for high, share in ((-0.2, 0.9), (0.9, 0.0)):
        chosen = [one for one in drawn if high - 0.5 < truth(one, -2.5) < high]
        failed = [math.isnan(failing.evaluate(one)) for one in chosen]
        assert statistics.mean(failed) >= share if share else not any(failed)
    scores = [TableProblem(TASK, shipped=fitted).evaluate(one) for one in drawn[:20]]
    assert all(math.isfinite(score) for score in scores)
    assert math.isfinite(failing.best) and math.isfinite(failing.evaluate(failing.best_params))


def test_curves_are_reported_to_pruners(fitted: Surfaces) -> None:
    problem = TableProblem(TASK, reports=True, shipped=fitted)
    pruner = optuna.pruners.ThresholdPruner(lower=0.05)
    study = study_of(problem, 30, pruner=pruner)
    states = {trial.state.name for trial in study.trials}
    assert states == {"PRUNED", "COMPLETE"}
    complete = next(trial for trial in study.trials if trial.state.name == "COMPLETE")
    steps = complete.params["max_steps"]
    assert sorted(complete.intermediate_values) == [
        max(1, round(share * steps)) for share in (0.25, 0.5, 0.75)
    ]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"task": "tiny/dates"}, "no table of 'tiny/dates'"),
        ({"task": "tiny/numerals-small"}, "tiny/numerals-small has not been measured"),
        ({"tuned": ["lr"]}, "no parameter 'lr'"),
        ({"fixed": {"lora_rank": 100}}, "lora_rank is 100"),
        ({"fixed": {"learning_rate": 1e-3}}, "learning_rate is tuned"),
        ({"ranges": {"lora_rank": (1, 8)}}, "lora_rank is not tuned"),
        ({"tuned": None, "ranges": {"lora_rank": (1, 100)}}, "lora_rank is 100"),
        ({"ranges": {"learning_rate": (1e-3, 1e-3)}}, "give a smallest and a largest value"),
        ({"tuned": ["layers"], "ranges": {"layers": ("all", "some")}}, "layers is 'some'"),
        ({"shift": {"lora_rank": 2.0}}, "only alpha_ratio and learning_rate"),
    ],
)
def test_mistakes_are_named(said: dict[str, Any], error: str, fitted: Surfaces) -> None:
    given = {"task": TASK, "tuned": ["learning_rate"], "shipped": fitted, **said}
    with pytest.raises(UserError, match=error):
        TableProblem(given.pop("task"), **given)
