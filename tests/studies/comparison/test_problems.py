"""Problems: their best value is what they say, and the median configuration has regret 1."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import optuna
import pytest

from studies.comparison import functions
from studies.comparison import networks
from studies.comparison.problem import Problem
from studies.comparison.problem import draw
from studies.comparison.synthetic import TEST_SEED
from studies.comparison.synthetic import synthetic_problems

HARTMANN = [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]


@pytest.mark.parametrize(
    ("problem", "params"),
    [
        (functions.classic_problems()[0], {"x": np.pi, "y": 2.275}),
        (functions.classic_problems()[1], {f"x{i}": v for i, v in enumerate(HARTMANN)}),
    ],
)
def test_a_known_optimum_has_no_regret(problem: Problem, params: dict[str, Any]) -> None:
    _, regret = problem.run(optuna.trial.FixedTrial(params), np.random.default_rng(0))
    assert regret == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("family", functions.BBOB)
@pytest.mark.parametrize("dimensions", [2, 5])
def test_a_bbob_function_is_least_at_its_shifted_optimum(family: str, dimensions: int) -> None:
    # What z = 0 scores is what the definitions put there: 0.
    assert functions.BBOB[family](np.zeros(dimensions)) == pytest.approx(0.0, abs=1e-9)
    problem = functions.bbob_problem(family, dimensions, 0)
    rng = np.random.default_rng(1)
    regrets = [problem.evaluate(draw(problem.space, rng), rng)[1] for _ in range(400)]
    assert min(regrets) > 0
    assert np.median(regrets) == pytest.approx(1.0, rel=0.35)


def test_instances_differ_and_each_is_always_the_same() -> None:
    first, again = (functions.bbob_problem("sphere", 2, 0).fingerprint() for _ in range(2))
    assert first == again
    assert functions.bbob_problem("sphere", 2, 1).fingerprint() != first


@pytest.mark.parametrize("instance", range(3))
def test_no_configuration_of_a_mixed_space_beats_the_best(instance: int) -> None:
    problem = functions.mixed_problem(instance)
    study = optuna.create_study(sampler=optuna.samplers.CmaEsSampler(seed=0))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []

    def objective(trial: optuna.Trial) -> float:
        score, regret = problem.run(trial, np.random.default_rng(0))
        found.append((score, regret))
        return -score

    study.optimize(objective, n_trials=200)
    # The regret is cut at 0, so that a wrong optimum would show in the score alone.
    assert max(score for score, _ in found) <= 0
    assert 0 <= min(regret for _, regret in found) < 0.4


def test_a_networks_best_point_is_one_that_was_measured() -> None:
    for problem in networks.network_problems():
        rng = np.random.default_rng(0)
        regrets = [problem.evaluate(draw(problem.space, rng), rng)[1] for _ in range(500)]
        assert np.median(regrets) == pytest.approx(1.0, rel=0.25)
        assert min(regrets) >= 0
        axes = itertools.product(*networks.AXES.values(), networks.ACTIVATIONS)
        names = [*networks.AXES, "activation"]
        measured = [
            problem.evaluate(dict(zip(names, point, strict=True)), rng)[1] for point in axes
        ]
        assert min(measured) == pytest.approx(0.0, abs=1e-9)


def test_synthetic_problems_say_what_they_are() -> None:
    problems = synthetic_problems(8, TEST_SEED)
    assert {p.domain for p in problems} == {"LoRA", "not LoRA"}
    for problem in problems:
        assert ("not LoRA" in problem.group) == (problem.domain == "not LoRA")
