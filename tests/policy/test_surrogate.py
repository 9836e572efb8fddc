from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from optuna_lora_rl.policy import surrogate as gp
from optuna_lora_rl.policy.surrogate import Lengthscales


def _data(n: int = 9, D: int = 3, B: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(B, n, D, generator=generator, dtype=torch.float64)
    X[:, :, D - 1] = (X[:, :, D - 1] * 3).floor() / 3
    y = torch.randn(B, n, generator=generator, dtype=torch.float64)
    unordered = torch.zeros(B, D, dtype=torch.bool)
    unordered[:, D - 1] = True
    return X, y, unordered


def _prior(B: int, D: int) -> Lengthscales:
    zero = torch.zeros(B, D, dtype=torch.float64)
    return Lengthscales(zero - 0.7, zero + 1.0)


def _kernel(a: np.ndarray, b: np.ndarray, length: np.ndarray, s: float) -> np.ndarray:
    """The textbook formula, one pair at a time; the last coordinate has no order."""
    k = np.zeros((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            difference = np.append(p[:-1] - q[:-1], float(p[-1] != q[-1]))
            r = math.sqrt(5 * float(((difference / length) ** 2).sum()))
            k[i, j] = s * (1 + r + r * r / 3) * math.exp(-r)
    return k


def test_the_posterior_is_the_textbooks() -> None:
    X, y, unordered = _data()
    mask = torch.ones(2, 9, dtype=torch.bool)
    x = _data(n=5, seed=1)[0]
    theta = torch.tensor([[-0.5, 0.2, 0.4, 0.3, -3.0], [0.1, -1.0, 0.0, -0.2, -2.0]]).double()
    fitted = gp.condition(X, y, mask, unordered, theta, torch.zeros_like(y))
    mean, deviation = fitted.posterior(x)
    for b in range(2):
        length, (s, v) = np.exp(theta[b, :3].numpy()), np.exp(theta[b, 3:].numpy())
        K = _kernel(X[b].numpy(), X[b].numpy(), length, s) + v * np.eye(9)
        k = _kernel(x[b].numpy(), X[b].numpy(), length, s)
        assert mean[b].numpy() == pytest.approx(k @ np.linalg.solve(K, y[b].numpy()), abs=1e-9)
        variance = s - np.einsum("ij,ji->i", k, np.linalg.solve(K, k.T))
        assert deviation[b].numpy() ** 2 == pytest.approx(variance, abs=1e-9)


def test_the_gradient_is_the_slope() -> None:
    X, y, unordered = _data()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    y = torch.where(mask, y, 0.0)
    sqd = gp._squared_differences(X, unordered)
    arguments = (sqd, y, mask, torch.full_like(y, 0.01), _prior(2, 3))
    theta = torch.tensor([[-0.5, 0.2, 0.4, 0.3, -3.0], [0.1, -1.0, 0.0, -0.2, -2.0]]).double()
    _, gradient = gp.negative_log_posterior(theta, *arguments)
    for j in range(5):
        e = torch.zeros_like(theta)
        e[:, j] = 1e-5
        above, _ = gp.negative_log_posterior(theta + e, *arguments)
        below, _ = gp.negative_log_posterior(theta - e, *arguments)
        assert gradient[:, j].numpy() == pytest.approx(((above - below) / 2e-5).numpy(), abs=1e-6)


def test_the_slope_of_the_expected_improvement_is_its_slope() -> None:
    X, y, unordered = _data(n=20)
    unordered[0] = False
    mask = torch.ones(2, 20, dtype=torch.bool)
    fitted = gp.fit(X, y, mask, unordered, _prior(2, 3))
    best = fitted.incumbent(mask)
    x = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value, slope = fitted.slope(x, best)
    expected = gp.log_expected_improvement(*fitted.posterior(x), best[:, None])
    assert value.numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    for j in range(3):
        e = torch.zeros_like(x)
        e[:, :, j] = 1e-6
        difference = (fitted.slope(x + e, best)[0] - fitted.slope(x - e, best)[0]) / 2e-6
        ordered = ~unordered[:, j]
        assert slope[ordered, :, j].numpy() == pytest.approx(
            difference[ordered].numpy(), rel=1e-4, abs=1e-4
        )
    assert not slope[1, :, 2].any()


def test_padding_changes_nothing() -> None:
    X, y, unordered = _data()
    short = torch.ones(2, 9, dtype=torch.bool)
    wide, wide_y = torch.cat([X, X + 7], 1), torch.cat([y, y * 100], 1)
    long = torch.cat([short, ~short], 1)
    x = _data(n=5, seed=1)[0]
    plain = gp.fit(X, y, short, unordered, _prior(2, 3)).posterior(x)
    padded = gp.fit(wide, wide_y, long, unordered, _prior(2, 3)).posterior(x)
    assert padded[0].numpy() == pytest.approx(plain[0].numpy(), abs=1e-6)
    assert padded[1].numpy() == pytest.approx(plain[1].numpy(), abs=1e-6)


def test_fitting_finds_which_coordinate_matters() -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.rand(1, 40, 4, generator=generator, dtype=torch.float64)
    y = torch.sin(7 * X[:, :, 1])
    y = (y - y.mean()) / y.std()
    mask, unordered = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    fitted = gp.fit(X, y, mask, unordered, _prior(1, 4))
    length = fitted.log_l[0].exp()
    assert length[1] < 0.2 * length[[0, 2, 3]].min()
    x = torch.rand(1, 50, 4, generator=generator, dtype=torch.float64)
    truth = torch.sin(7 * x[:, :, 1])
    mean = fitted.posterior(x)[0]
    assert np.corrcoef(mean[0], truth[0])[0, 1] > 0.99


def test_a_believed_trial_keeps_the_mean_and_loses_its_uncertainty() -> None:
    X, y, unordered = _data(B=1)
    mask = torch.ones(1, 9, dtype=torch.bool)
    x = _data(n=2, B=1, seed=5)[0]
    fitted = gp.fit(X, y, mask, unordered, _prior(1, 3))
    believed = gp.believe(fitted, y, torch.zeros_like(y), x, torch.tensor([[True, False]]))
    mean, deviation = fitted.posterior(x)
    later_mean, later = believed.posterior(x)
    assert later_mean.numpy() == pytest.approx(mean.numpy(), abs=1e-6)
    assert later[0, 0] < 0.5 * deviation[0, 0]


def test_without_data_it_is_the_prior() -> None:
    X = torch.zeros(1, 0, 2, dtype=torch.float64)
    none = torch.zeros(1, 0, dtype=torch.bool)
    unordered = torch.zeros(1, 2, dtype=torch.bool)
    fitted = gp.fit(X, X[:, :, 0], none, unordered, _prior(1, 2))
    mean, deviation = fitted.posterior(torch.rand(1, 3, 2).double())
    assert mean.tolist() == [[0.0] * 3]
    assert deviation.numpy() == pytest.approx(1.0)


def test_equal_points_do_not_break_the_fit() -> None:
    X = torch.full((1, 30, 2), 0.5, dtype=torch.float64)
    y = torch.zeros(1, 30, dtype=torch.float64)
    mask, unordered = torch.ones(1, 30, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    mean, deviation = gp.fit(X, y, mask, unordered, _prior(1, 2)).posterior(X[:, :1] + 0.1)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(deviation).all()


@pytest.mark.parametrize(("mean", "deviation", "best"), [(0.3, 0.7, 0.0), (-1.0, 0.8, 0.5)])
def test_expected_improvement_against_monte_carlo(
    mean: float, deviation: float, best: float
) -> None:
    draws = mean + deviation * np.random.default_rng(0).normal(size=2_000_000)
    expected = np.maximum(draws - best, 0).mean()
    arguments = (torch.tensor([v], dtype=torch.float64) for v in (mean, deviation, best))
    assert gp.log_expected_improvement(*arguments).exp().item() == pytest.approx(
        expected, rel=0.02
    )


def test_expected_improvement_stays_finite_and_rising_far_below_the_best() -> None:
    mean = torch.linspace(-1e5, 5.0, 4001, dtype=torch.float64)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    value = gp.log_expected_improvement(mean, one, zero)
    assert torch.isfinite(value).all()
    assert (value.diff() > 0).all()
