"""A Gaussian process for one study; the twin of :mod:`~optuna_lora_rl.policy.surrogate`.

Notations
    X     observed coordinates, shape (n, D);  x: points, shape (N, D);  y: scores, shape (n,)
    theta ``cat(log_l, log_s, log_v)``, shape (D + 2,)
    sqd   squared differences by coordinate, shape (D, n * n)
    S     starts of the fit, climbed in step
    L     Cholesky factor of K = s M + diag(v + extra), shape (n, n);  alpha = K^-1 y

Factors and triangular solutions are torch's, whose LAPACK needs no copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.surrogate import LOG_S_PRIOR
from optuna_lora_rl.policy.surrogate import LOG_V_MIN
from optuna_lora_rl.policy.surrogate import LOG_V_PRIOR
from optuna_lora_rl.policy.surrogate import Surrogate
from optuna_lora_rl.policy.surrogate import factor

_SQRT5, _SQRT_HALF = math.sqrt(5.0), math.sqrt(0.5)
_MILLS, _LOG_ROOT = math.sqrt(0.5 * math.pi), 0.5 * math.log(2.0 * math.pi)
# Beyond so many deviations below the best, 1 - ratio is lost to rounding; above, Phi is 1.
_FAR, _SURE = -1e3, 25.0


@dataclass(frozen=True)
class Improvement:
    """Log expected improvement and what its gradient needs, shape (N,) each.

    Args:
        value: log E[max(f - best, 0)].
        by_mean: its derivative by the mean.
        by_deviation: its derivative by the deviation.
    """

    value: np.ndarray
    by_mean: np.ndarray
    by_deviation: np.ndarray


def log_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> Improvement:
    """Log of E[max(f - best, 0)] for f ~ N(mean, deviation^2), accurate far below the best.

    With z = (mean - best) / deviation and Mills' ratio R = Phi / phi the improvement is
    deviation phi (1 + z R), and its derivatives are Phi and phi (Ament et al. 2023, eq. 8-9).
    """
    z = (mean - best) / deviation
    low = np.minimum(z, _SURE)
    ratio = _MILLS * torch.special.erfcx(torch.from_numpy(-_SQRT_HALF * low)).numpy()
    gap = np.maximum(1.0 + low * ratio, 1e-30)
    if z.size and z.min() <= _FAR:
        gap = np.where(z <= _FAR, 1.0 / (z * z), gap)
    scale = gap * deviation
    value = np.log(scale) - 0.5 * low * low - _LOG_ROOT
    if z.size and z.max() > _SURE:
        sure = z > _SURE
        value = np.where(sure, np.log(np.where(sure, z * deviation, 1.0)), value)
    return Improvement(value, ratio / scale, 1.0 / scale)


class Process:
    """The process with hyperparameters ``theta`` given observations.

    Args:
        X: coordinates; no NaN.
        y: standardised scores.
        unordered: coordinates without order, shape (D,).
        theta: hyperparameters.
        extra: noise variance known beforehand, shape (n,).
    """

    def __init__(
        self,
        X: np.ndarray,
        y: np.ndarray,
        unordered: np.ndarray,
        theta: np.ndarray,
        extra: np.ndarray,
    ) -> None:
        self.X, self.y, self.unordered, self.theta, self.extra = X, y, unordered, theta, extra
        self.s = float(np.exp(theta[-2]))
        self._scale = np.where(unordered, 0.0, np.exp(-theta[:-2]))
        self._odd = [(int(j), math.exp(-2.0 * theta[j])) for j in np.flatnonzero(unordered)]
        self._p = X * self._scale
        self._p2 = (self._p * self._p).sum(1)[:, None]
        K = self._kernel(X)
        diagonal = K.reshape(-1)[:: len(X) + 1]
        diagonal[:] = self.s
        self._at_trials = K.copy()
        diagonal += math.exp(theta[-1]) + extra
        self.L = factor(torch.from_numpy(K)[None])[0]
        told = torch.from_numpy(np.ascontiguousarray(y))[:, None]
        self._alpha = torch.cholesky_solve(told, self.L)[:, 0].numpy()

    def batched(self) -> Surrogate:
        """The same as a batch of one."""
        tensors = (self.X, np.ones(len(self.X), dtype=bool), self.unordered)
        X, mask, unordered = (torch.from_numpy(array)[None] for array in tensors)
        theta = torch.from_numpy(self.theta)[None]
        alpha = torch.from_numpy(self._alpha)[None]
        return Surrogate(
            X, mask, unordered, theta[:, :-2], theta[:, -2], theta[:, -1], self.L[None], alpha
        )

    def apart(self, x: np.ndarray) -> np.ndarray:
        """What coordinates without order add to squared distances, shape (n, N)."""
        r2 = np.zeros((len(self.X), len(x)))
        for j, weight in self._odd:
            r2 += weight * (np.abs(self.X[:, j, None] - x[:, j]) > 1e-6)
        return r2

    def _squared_distance(self, x: np.ndarray, apart: np.ndarray) -> np.ndarray:
        q = x * self._scale
        r2: np.ndarray = self._p @ (-2.0 * q.T)
        r2 += self._p2
        r2 += (q * q).sum(1)
        np.maximum(r2, 0.0, out=r2)
        r2 += apart
        return r2

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        r = _root(self._squared_distance(x, self.apart(x)))
        decay = np.exp(-r)
        decay *= self.s
        return _poly(r) * decay

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the noise-free score at coordinates x, (N,) each."""
        if not len(self.X):
            return np.zeros(len(x)), np.full(len(x), math.sqrt(max(self.s, 1e-10)))
        k = self._kernel(x)
        v = torch.linalg.solve_triangular(self.L, torch.from_numpy(k), upper=False).numpy()
        variance = self.s - np.einsum("nj,nj->j", v, v)
        return self._alpha @ k, np.sqrt(np.maximum(variance, 1e-10))

    def slope(
        self, x: np.ndarray, best: float, apart: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log expected improvement over ``best`` at x, shape (N,), and its gradient, (N, D).

        ``apart`` of x stays as it is on the way up: only ordered coordinates move.
        """
        r = _root(self._squared_distance(x, apart))
        decay = np.exp(-r)
        decay *= self.s
        k = _poly(r) * decay
        u = torch.cholesky_solve(torch.from_numpy(k), self.L).numpy()
        mean = self._alpha @ k
        variance = self.s - (k * u).sum(0)
        deviation = np.sqrt(np.maximum(variance, 1e-10))
        gain = log_improvement(mean, deviation, best)
        # d k_i / d x_j = slope_i (X_ij - x_j) / l_j^2
        r += 1.0
        r *= decay
        r *= 5.0 / 3.0
        pull = r * (gain.by_mean * self._alpha[:, None] - (gain.by_deviation / deviation) * u)
        gradient = pull.T @ self.X - pull.sum(0)[:, None] * x
        gradient *= self._scale * self._scale
        return gain.value, gradient

    def incumbent(self, eligible: np.ndarray) -> float:
        """The best posterior mean at an eligible trial, shape (n,); see the batched twin."""
        if not len(self.X):
            return 0.0
        mean = self._at_trials @ self._alpha
        return float(mean[eligible].max()) if eligible.any() else float(mean.min()) - 1.0

    def believe(self, x: np.ndarray) -> Process:
        """Conditioned also on running trials x (m, D), taken to end at their predicted mean."""
        mean, _ = self.posterior(x)
        return Process(
            np.concatenate([self.X, x]),
            np.concatenate([self.y, mean]),
            self.unordered,
            self.theta,
            np.concatenate([self.extra, np.zeros(len(x))]),
        )


def _root(r2: np.ndarray) -> np.ndarray:
    """sqrt(5 r2), in place."""
    r2 += 1e-18
    np.sqrt(r2, out=r2)
    r2 *= _SQRT5
    return r2


def _poly(r: np.ndarray) -> np.ndarray:
    """1 + r + r^2 / 3."""
    poly = r * r
    poly /= 3.0
    poly += r
    poly += 1.0
    return poly


def fit_theta(
    X: np.ndarray,
    y: np.ndarray,
    unordered: np.ndarray,
    log_l: np.ndarray,
    extra: np.ndarray,
    *,
    iterations: int,
    fit_rows: int,
) -> np.ndarray:
    """Hyperparameters at the most probable place, from two starts; see ``surrogate.fit``.

    Args:
        X: coordinates.
        y: standardised scores.
        unordered: coordinates without order, shape (D,).
        log_l: prior mean and deviation of the log lengthscales, shape (D, 2).
        extra: noise variance known beforehand, shape (n,).
        iterations: gradient steps; 0 takes the prior's centre.
        fit_rows: fit on at most so many rows, evenly spread.
    """
    variances = np.array([LOG_S_PRIOR, LOG_V_PRIOR])
    prior = np.concatenate([log_l, variances])
    centre = prior[:, 0]
    if not iterations or not len(X):
        return centre
    rows = torch.linspace(0, len(X) - 1, min(len(X), fit_rows)).round().long().numpy()
    X, y, extra = X[rows], y[rows], extra[rows]
    difference = X[:, None, :] - X[None, :, :]
    sqd = difference * difference
    sqd = np.where(unordered, sqd > 1e-12, sqd).reshape(-1, X.shape[1])
    starts = np.stack([centre, centre - 1.0])
    best, values = _minimise(starts, np.ascontiguousarray(sqd.T), y, extra, prior, iterations)
    return best[1] if values[1] < values[0] else best[0]


def _minimise(
    theta: np.ndarray,
    sqd: np.ndarray,
    y: np.ndarray,
    extra: np.ndarray,
    prior: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """iRprop- from theta (S, D + 2): the best parameters met and their values (S,)."""
    step, previous = np.full(theta.shape, 0.3), np.zeros(theta.shape)
    best, best_value = theta.copy(), np.full(len(theta), math.inf)
    for _ in range(iterations):
        value, gradient = negative_log_posterior(theta, sqd, y, extra, prior)
        better = value < best_value
        best[better], best_value[better] = theta[better], value[better]
        agreement = gradient * previous
        turned = agreement < 0
        step[agreement > 0] *= 1.2
        step[turned] *= 0.5
        step = np.minimum(np.maximum(step, 1e-3), 1.0)
        gradient[turned] = 0.0
        theta = theta - np.sign(gradient) * step
        theta[:, -1] = np.minimum(np.maximum(theta[:, -1], LOG_V_MIN), 1.0)
        previous = gradient
    return best, best_value


def negative_log_posterior(
    theta: np.ndarray, sqd: np.ndarray, y: np.ndarray, extra: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values (S,) and gradients (S, D + 2); ``prior``: means and deviations, (D + 2, 2)."""
    S, n = len(theta), len(y)
    w, s, v = np.exp(-2.0 * theta[:, :-2]), np.exp(theta[:, -2]), np.exp(theta[:, -1])
    r = _root((w @ sqd).reshape(S, n, n))
    decay = np.exp(-r)
    decay *= s[:, None, None]
    K = _poly(r) * decay
    diagonal = np.einsum("sii->si", K)
    diagonal += v[:, None] + extra
    L = factor(torch.from_numpy(K))
    K_inv: np.ndarray = _inverse(L)
    alpha = K_inv @ y
    value = 0.5 * (alpha @ y) + np.log(L.diagonal(dim1=1, dim2=2).numpy()).sum(1)
    K_inv -= alpha[:, :, None] * alpha[:, None, :]  # dNLL/dK = W / 2
    W_diagonal = np.einsum("sii->si", K_inv)
    on_diagonal = (W_diagonal * (s[:, None] - diagonal)).sum(1)
    gradient = np.empty_like(theta)
    gradient[:, -2] = 0.5 * (np.einsum("sij,sij->s", K, K_inv) + on_diagonal)
    gradient[:, -1] = 0.5 * W_diagonal.sum(1) * v
    r += 1.0
    r *= decay
    r *= K_inv
    gradient[:, :-2] = (2.5 / 3.0) * (r.reshape(S, n * n) @ sqd.T) * w
    z = (theta - prior[:, 0]) / prior[:, 1]
    return value + 0.5 * (z * z).sum(1), gradient + z / prior[:, 1]


def _inverse(L: Tensor) -> np.ndarray:
    inverse: np.ndarray = torch.cholesky_inverse(L).numpy()
    return inverse
