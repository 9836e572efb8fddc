from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.policy.scores import standardise


def _standard(scores: list[float]) -> np.ndarray:
    return standardise(np.array(scores, dtype=float), np.zeros(len(scores), dtype=bool))


def test_one_diverged_run_does_not_flatten_the_scale() -> None:
    standard = _standard([0.50, 0.52, 0.54, 0.56, -1e9])
    assert np.diff(standard[:4]).min() > 0.1
    assert standard[4] == standard.min()


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [np.inf, -np.inf], [0.0, np.inf, 1.0]])
def test_standardised_scores_are_finite_and_keep_their_order(scores: list[float]) -> None:
    standard = _standard(scores)
    assert np.isfinite(standard).all()
    assert (np.diff(standard[np.argsort(scores, kind="stable")]) >= 0).all()


def test_scores_of_any_unit_standardise_alike() -> None:
    scores = [0.1, 0.5, 0.45, 0.3]
    assert _standard([1e-6 * s - 7 for s in scores]) == pytest.approx(_standard(scores), abs=1e-6)


@pytest.mark.parametrize("unit", [1e-300, 1e-160, 1e155, 1e300])
def test_no_unit_is_too_large_or_too_small(unit: float) -> None:
    scores = [0.1, 0.5, 0.45, 0.3]
    assert _standard([unit * s for s in scores]) == pytest.approx(_standard(scores))


@pytest.mark.parametrize("diverged", [-1e4, -1e300, -1.7e308])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_good_runs_stay_apart_whatever_most_of_the_others_diverged_to(
    diverged: float, count: int
) -> None:
    good = [-1.4, -1.3, -1.2, -1.1, -1.0]
    standard = _standard([diverged] * count + good)
    assert np.diff(standard[count:]).min() > 0.1
    assert standard[:count] == pytest.approx(standard.min())


def test_a_search_that_closes_in_is_no_divergence() -> None:
    assert (np.diff(_standard((-np.geomspace(1e-6, 1.0, 13)).tolist())[:9]) < 0).all()


def test_a_failed_trial_stands_below_the_worst() -> None:
    failed = np.array([False, False, False, True])
    y = standardise(np.array([3.0, 1.0, 2.0, 99.0]), failed)
    assert y[3] < y[:3].min()
    assert y[:3].mean() == pytest.approx(0.0)


def test_only_failures_are_worse_than_the_unknown() -> None:
    assert (standardise(np.zeros(2), np.ones(2, dtype=bool)) < 0).all()


def test_weights_reach_every_part_of_a_concave_front() -> None:
    """A weighted sum would only ever choose the two ends."""
    t = np.linspace(0, 1, 11)
    front = np.stack([t, 1 - np.sqrt(t)], axis=1)
    chosen = {
        int(np.argmax(scalarise(front, np.array([w, 1 - w])))) for w in np.linspace(0.02, 0.98, 49)
    }
    assert len(chosen) >= 8


def test_the_units_of_an_objective_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((30, 3))
    weights = np.array([0.2, 0.5, 0.3])
    scaled = scores * np.array([1.0, 1e6, 1e-3]) + 5
    assert scalarise(scaled, weights) == pytest.approx(scalarise(scores, weights), abs=1e-6)
