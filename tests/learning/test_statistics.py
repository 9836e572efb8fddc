"""Intervals, ranks and wins."""

from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl.learning import statistics


def test_the_interval_is_that_of_a_mean_over_problems() -> None:
    rng = np.random.default_rng(0)
    # Problems differ, seeds do not: the error is the deviation over the root of the problems.
    values = np.repeat(rng.normal(0.2, 1.0, size=(100, 1)), 2, axis=1)
    found = statistics.interval(values)
    assert found["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 10
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_seeds_of_one_problem_are_resampled_too() -> None:
    values = np.array([[0.0, 1.0] * 50])
    found = statistics.interval(values)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_one_surface_in_three_guises_is_no_threefold_evidence() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    alone = statistics.interval(values)
    guises = statistics.interval(
        np.repeat(values, 3, axis=0), np.repeat(np.arange(30), 3).tolist()
    )
    assert guises == pytest.approx(alone)
    apart = statistics.interval(np.repeat(values, 3, axis=0))
    assert apart["high"] - apart["low"] < 0.75 * (alone["high"] - alone["low"])


def test_clusters_of_unequal_size_keep_the_mean() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    found = statistics.interval(values, [7, 7, 7, 2])
    assert found == pytest.approx({"mean": 0.75, "low": 0.0, "high": 1.0})


def test_equal_differences_leave_no_doubt() -> None:
    found = statistics.interval(np.full((3, 2), -0.1))
    assert found == pytest.approx({"mean": -0.1, "low": -0.1, "high": -0.1})


def test_equal_regrets_share_a_rank() -> None:
    curves = {"a": [0.1, 0.0], "b": [0.1, 0.5], "c": [0.7, 0.2]}
    ranks = statistics.ranks({k: np.array([[v]]) for k, v in curves.items()})
    assert {k: v[0, 0].tolist() for k, v in ranks.items()} == {
        "a": [1.5, 1.0],
        "b": [1.5, 3.0],
        "c": [3.0, 2.0],
    }


def test_where_a_curve_reaches_a_regret() -> None:
    curve = np.array([[[0.9, 0.5, 0.2, 0.1]] * 2])
    assert statistics.reaches(curve, 0.2) == (3, 3, 3)
    assert statistics.reaches(curve, 0.05) == (None, None, None)


def test_wins_are_counted_by_problem() -> None:
    ours = np.array([[0.1, 0.3], [0.2, 0.2], [0.5, 0.5]])
    theirs = np.array([[0.4, 0.4], [0.205, 0.205], [0.1, 0.1]])
    assert statistics.wins(ours, theirs) == (1, 1, 1)
