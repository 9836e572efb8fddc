from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optuna_lora_rl.policy.surrogate import Posterior
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import factor
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.policy.surrogate import log_improvement

UNORDERED = np.array([False, False, True])
PRIOR = np.tile([-0.7, 1.0], (3, 1))
THETA = np.array([-0.5, 0.2, 0.4, 0.3, -3.0])


def _data(n: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points and scores; the last coordinate has no order and three values."""
    rng = np.random.default_rng(seed)
    X = rng.random((n, 3))
    X[:, 2] = np.floor(X[:, 2] * 3) / 3
    return X, rng.normal(size=n)


def _fitted(
    X: np.ndarray, y: np.ndarray, unordered: np.ndarray = UNORDERED, **how: int
) -> Process:
    none = np.zeros(len(y))
    log_l = np.tile(PRIOR[0], (X.shape[1], 1))
    steps = {"iterations": 40, "fit_rows": 100, **how}
    return Process(X, y, unordered, fit_theta(X, y, unordered, log_l, none, **steps), none)


def _kernel(a: np.ndarray, b: np.ndarray, length: np.ndarray, s: float) -> np.ndarray:
    """The textbook formula, one pair at a time; the last coordinate has no order."""
    k = np.zeros((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            difference = np.append(p[:-1] - q[:-1], float(p[-1] != q[-1]))
            r = math.sqrt(5 * float(((difference / length) ** 2).sum()))
            k[i, j] = s * (1 + r + r * r / 3) * math.exp(-r)
    return k


def _textbook(
    X: np.ndarray, y: np.ndarray, x: np.ndarray, extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    length, (s, v) = np.exp(THETA[:3]), np.exp(THETA[3:])
    K = _kernel(X, X, length, s) + np.diag(v + extra)
    k = _kernel(x, X, length, s)
    return k @ np.linalg.solve(K, y), s - np.einsum("ij,ji->i", k, np.linalg.solve(K, k.T))


def test_the_posterior_is_the_textbooks() -> None:
    (X, y), x = _data(), _data(5, 1)[0]
    extra = np.arange(9) % 2 * 0.05
    process = Process(X, y, UNORDERED, THETA, extra)
    mean, deviation = process.posterior(x)
    wanted, variance = _textbook(X, y, x, extra)
    assert mean == pytest.approx(wanted, abs=1e-9)
    assert deviation**2 == pytest.approx(variance, abs=1e-9)
    assert process.at_trials == pytest.approx(_textbook(X, y, X, extra)[0], abs=1e-9)


def test_each_score_is_predicted_from_the_others() -> None:
    (X, y), none = _data(), np.zeros(8)
    left_out = Process(X, y, UNORDERED, THETA, np.zeros(9)).leave_one_out()
    for i in range(9):
        others = np.arange(9) != i
        wanted, _ = _textbook(X[others], y[others], X[i : i + 1], none)
        assert left_out[i] == pytest.approx(wanted[0], abs=1e-9)


def test_the_value_and_the_gradient_of_the_fit_are_right() -> None:
    (X, y), extra = _data(), np.arange(9) % 2 * 0.05
    difference = X[:, None] - X[None]
    sqd = np.where(UNORDERED, difference != 0, difference**2).reshape(-1, 3)
    prior = np.concatenate([PRIOR, [[0.0, 1.0], [-5.0, 1.5]]])
    posterior = Posterior(sqd, y, extra, prior)
    theta = np.stack([THETA, [0.1, -1.0, 0.0, -0.2, -2.0]])
    values, gradient = posterior.negative_log(theta)
    K = _kernel(X, X, np.exp(THETA[:3]), np.exp(THETA[3])) + np.diag(np.exp(THETA[4]) + extra)
    wanted = 0.5 * (y @ np.linalg.solve(K, y) + np.linalg.slogdet(K)[1])
    wanted += 0.5 * np.square((THETA - prior[:, 0]) / prior[:, 1]).sum()
    assert values[0] == pytest.approx(wanted, abs=1e-9)
    for j in range(5):
        e = np.zeros((2, 5))
        e[:, j] = 1e-5
        above, below = posterior.negative_log(theta + e)[0], posterior.negative_log(theta - e)[0]
        assert gradient[:, j] == pytest.approx((above - below) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("unordered", [UNORDERED, np.zeros(3, dtype=bool)])
def test_the_slope_of_the_expected_improvement_is_its_slope(unordered: np.ndarray) -> None:
    process = _fitted(*_data(20), unordered)
    best = process.incumbent(np.ones(20, dtype=bool))
    x = np.random.default_rng(2).random((6, 3))
    x[:, 2] = 1 / 3
    slope = process.slope(x, best, process.apart(x))

    def value(x: np.ndarray) -> np.ndarray:
        return log_improvement(*process.posterior(x), best).value

    for j in np.flatnonzero(~unordered):
        e = np.zeros(3)
        e[j] = 1e-6
        difference = (value(x + e) - value(x - e)) / 2e-6
        assert slope[:, j] == pytest.approx(difference, rel=1e-4, abs=1e-4)
    assert not slope[:, unordered].any()


def test_fitting_finds_which_coordinate_matters() -> None:
    rng = np.random.default_rng(3)
    X, x = rng.random((40, 4)), rng.random((50, 4))
    y = np.sin(7 * X[:, 1])
    process = _fitted(X, (y - y.mean()) / y.std(), np.zeros(4, dtype=bool))
    length = np.exp(process.theta[:4])
    assert length[1] < 0.2 * length[[0, 2, 3]].min()
    assert np.corrcoef(process.posterior(x)[0], np.sin(7 * x[:, 1]))[0, 1] > 0.99


def test_a_fit_that_goes_on_comes_nearer() -> None:
    X, y = _data(15)
    none, whole = np.zeros(15), {"iterations": 100, "fit_rows": 15}
    arguments = (X, y, UNORDERED, PRIOR, none)
    end = fit_theta(*arguments, **whole)
    begun = fit_theta(*arguments, iterations=12, fit_rows=15)
    further = fit_theta(*arguments, iterations=20, fit_rows=15, start=begun)
    assert np.abs(further - end).max() < np.abs(begun - end).max()
    assert np.array_equal(
        fit_theta(X[:0], y[:0], UNORDERED, PRIOR, none[:0], **whole)[:3], PRIOR[:, 0]
    )


def test_a_long_history_is_fitted_by_rows_that_are_evenly_spread() -> None:
    X, y = _data(50)
    some = _fitted(X, y, fit_rows=25).theta
    every = np.linspace(0, 49, 25).round().astype(int)
    assert some == pytest.approx(_fitted(X[every], y[every]).theta, abs=1e-9)


def test_a_believed_trial_keeps_the_mean_and_loses_its_uncertainty() -> None:
    process, x = _fitted(*_data()), _data(2, 5)[0]
    believed = process.believe(x[:1])
    mean, deviation = process.posterior(x)
    later_mean, later = believed.posterior(x)
    assert later_mean == pytest.approx(mean, abs=1e-6)
    assert later[0] < 0.5 * deviation[0]


def test_without_data_it_is_the_prior() -> None:
    process = _fitted(np.zeros((0, 3)), np.zeros(0))
    mean, deviation = process.posterior(np.random.default_rng(0).random((3, 3)))
    assert mean.tolist() == [0.0] * 3
    assert deviation == pytest.approx(1.0)
    assert process.incumbent(np.zeros(0, dtype=bool)) == 0.0


def test_without_a_good_trial_everything_promises_to_improve() -> None:
    process = _fitted(*_data())
    none = process.incumbent(np.zeros(9, dtype=bool))
    assert none == pytest.approx(process.at_trials.min() - 1.0)


def test_equal_points_do_not_break_the_fit() -> None:
    X = np.full((30, 3), 0.5)
    mean, deviation = _fitted(X, np.zeros(30)).posterior(X[:1] + 0.1)
    assert np.isfinite([mean, deviation]).all()
    singular = torch.ones((1, 4, 4), dtype=torch.float64)
    L = factor(singular)
    torch.testing.assert_close(L @ L.mT, singular, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mean", "deviation", "best"), [(0.3, 0.7, 0.0), (-1.0, 0.8, 0.5)])
def test_expected_improvement_against_monte_carlo(
    mean: float, deviation: float, best: float
) -> None:
    draws = mean + deviation * np.random.default_rng(0).normal(size=2_000_000)
    expected = np.maximum(draws - best, 0).mean()
    value = log_improvement(np.array([mean]), np.array([deviation]), best).value
    assert math.exp(value[0]) == pytest.approx(expected, rel=0.02)


def test_expected_improvement_is_right_from_far_below_to_far_above() -> None:
    mean = np.linspace(-1e5, 5.0, 4001)
    value = log_improvement(mean, np.ones(4001), 0.0).value
    assert np.isfinite(value).all()
    assert (np.diff(value) > 0).all()
    # Far below, phi(z) / z^2; far above, the mean itself.
    far = log_improvement(np.array([-1e4, 26.0, 400.0]), np.full(3, 0.5), 0.0).value
    z = 2e4
    below = math.log(0.5) - 0.5 * z * z - 0.5 * math.log(2 * math.pi) - 2 * math.log(z)
    assert far == pytest.approx([below, math.log(26.0), math.log(400.0)], rel=1e-9)


def test_expected_improvement_knows_its_slopes() -> None:
    mean, deviation = np.array([-50.0, -3.0, -1.0, 0.0, 0.7, 5.0]), np.full(6, 0.5)
    gain, step = log_improvement(mean, deviation, 0.1), 1e-6
    by_mean = log_improvement(mean + step, deviation, 0.1).value - gain.value
    by_deviation = log_improvement(mean, deviation + step, 0.1).value - gain.value
    assert gain.by_mean == pytest.approx(by_mean / step, rel=1e-3)
    assert gain.by_deviation == pytest.approx(by_deviation / step, rel=1e-2, abs=1e-6)
