"""Measured tables in several guises."""

from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl.learning.tables.surfaces import Surfaces
from studies.comparison import measured
from studies.comparison.problem import Problem
from studies.comparison.problem import draw
from tests.learning.tables.conftest import fits  # noqa: F401
from tests.learning.tables.conftest import fitted  # noqa: F401
from tests.learning.tables.conftest import prices  # noqa: F401
from tests.learning.tables.conftest import tables  # noqa: F401


def regrets(problem: Problem, count: int = 300) -> list[float]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        try:
            found.append(problem.evaluate(draw(problem.space, rng), rng)[1])
        except FloatingPointError:
            continue
    return found


@pytest.mark.parametrize("guise", measured.GUISES)
def test_regret_is_normalised_in_every_guise(guise: str, fitted: Surfaces) -> None:  # noqa: F811
    problem = measured.table_problem(fitted.names[0], guise, fitted)
    found = regrets(problem)
    assert np.median(found) == pytest.approx(1.0, abs=0.3)
    assert 0 <= min(found) < 0.6


def test_guises_differ_in_scale_alone(fitted: Surfaces) -> None:  # noqa: F811
    usual, high, low = (
        measured.table_problem(fitted.names[0], guise, fitted)
        for guise in ("usual", "high", "low")
    )
    rng = np.random.default_rng(0)
    params = draw(high.space, rng) | {"learning_rate": 2e-3}
    regret = high.evaluate(params, rng)[1]
    for problem, scale in ((usual, 0.1), (low, 0.01)):
        scaled = problem.evaluate(params | {"learning_rate": 2e-3 * scale}, rng)[1]
        assert scaled == pytest.approx(regret, abs=1e-6)
        assert problem.space["learning_rate"].high == pytest.approx(0.1 * scale)  # type: ignore[attr-defined]
