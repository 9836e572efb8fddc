"""A Gaussian process.

Notations
    n, N  trials and candidates, D coordinates of the model
    X     observed coordinates, shape (n, D);  x: points, shape (N, D);  y: scores, shape (n,)
    theta log lengthscales, log variance of the signal and of the noise,
          ``cat(log_l, log_s, log_v)``, shape (D + 2,)
    sqd   squared differences by coordinate, shape (n * n, D)
    S     starts of the fit, climbed in step
    L     Cholesky factor of K = s M + diag(v + extra), shape (n, n);  alpha = K^-1 y

Matérn 5/2 with one lengthscale a coordinate; a coordinate without order contributes 0 or 1.
Hyperparameters are the maximum a posteriori under log-normal priors, by iRprop- with the analytic
gradient (Rasmussen & Williams 2006, eq. 5.9; Blum & Riedmiller 2013 on Rprop for this use), which
needs no line search.

Factors and special functions are torch's. On matrices this small ``dot`` costs half of ``@``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOG_V_MIN = math.log(1e-6)
# Log-normal priors of the variances, for scores with variance 1.
LOG_S_PRIOR = (0.0, 1.0)
LOG_V_PRIOR = (math.log(3e-3), 1.5)
# In place of a squared distance of 0, whose root has no slope (times 5, as all of them here).
_ZERO = 5e-18
# How a step grows where the sign is new (0), stayed (1) or turned (-1, the last).
_GROWTH = np.array([1.0, 1.2, 0.5])
_SQRT5, _SQRT_HALF = math.sqrt(5.0), math.sqrt(0.5)
_MILLS, _LOG_ROOT = math.sqrt(0.5 * math.pi), 0.5 * math.log(2.0 * math.pi)
# Beyond so many deviations below the best, 1 - ratio is lost to rounding; above, Phi is 1.
_FAR, _SURE = -1e3, 25.0


class Improvement(NamedTuple):
    """Log expected improvement and what its gradient needs, shape (N,) each.

    Args:
        value: log E[max(f - best, 0)].
        by_mean: its derivative by the mean.
        by_deviation: its derivative by the deviation.
    """

    value: np.ndarray
    by_mean: np.ndarray
    by_deviation: np.ndarray


def log_improvement(
    mean: np.ndarray, deviation: np.ndarray, best: float | np.ndarray
) -> Improvement:
    """Log of E[max(f - best, 0)] for f ~ N(mean, deviation^2), accurate far below the best.

    With z = (mean - best) / deviation and Mills' ratio R = Phi / phi the improvement is
    deviation phi (1 + z R), and its derivatives are Phi and phi (Ament et al. 2023, eq. 8-9).
    """
    z = (mean - best) / deviation
    usual = not z.size or (z.min() > _FAR and z.max() <= _SURE)
    low = z if usual else np.minimum(z, _SURE)
    ratio = _MILLS * torch.special.erfcx(torch.from_numpy(-_SQRT_HALF * low)).numpy()
    gap = np.maximum(1.0 + low * ratio, 1e-30)
    if not usual:
        gap = np.where(z > _FAR, gap, 1.0 / (z * z))
    scale = gap * deviation
    value = np.log(scale) - 0.5 * low * low - _LOG_ROOT
    if not usual:
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
        scale = np.where(unordered, 0.0, np.exp(-theta[:-2]))
        # Distances come with the 5 of the kernel, so that it need not be multiplied in each time.
        self._stretch = _SQRT5 * scale
        self._pull = (5.0 / 3.0) * scale * scale
        self._odd = [(int(j), 5.0 * math.exp(-2.0 * theta[j])) for j in np.flatnonzero(unordered)]
        p = X * self._stretch
        self._p2, self._minus_2p = (p * p).sum(1)[:, None], -2.0 * p
        K, _ = self._kernel(X, self.apart(X))
        diagonal = K.reshape(-1)[:: len(X) + 1]
        diagonal[:] = self.s
        self._at_trials = K.copy()
        diagonal += math.exp(theta[-1]) + extra
        L, info = torch.linalg.cholesky_ex(torch.from_numpy(K))
        if info.item():
            L = factor(torch.from_numpy(K)[None])[0]
        # The inverse of L once: the climb multiplies by it again and again.
        eye = torch.eye(len(X), dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        self._inverse: np.ndarray = np.ascontiguousarray(inverse.numpy())
        self._alpha = self.solve(y)

    def solve(self, y: np.ndarray) -> np.ndarray:
        """K^-1 y, for scores of shape (n,) or (n, P)."""
        solution: np.ndarray = self._inverse.T @ (self._inverse @ y)
        return solution

    def apart(self, x: np.ndarray) -> np.ndarray:
        """The part of 5 r^2 that stays while only ordered coordinates move, (n, N) or (n, 1)."""
        r2 = self._p2
        for j, weight in self._odd:
            r2 = r2 + weight * (np.abs(self.X[:, j, None] - x[:, j]) > 1e-6)
        return r2

    def _kernel(self, x: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kernel between X and x, shape (n, N), and (1 + r) s exp(-r) for its slope."""
        q = x * self._stretch
        r: np.ndarray = self._minus_2p.dot(q.T)
        r += apart
        r += (q * q).sum(1)
        np.maximum(r, _ZERO, out=r)
        np.sqrt(r, out=r)
        return _matern(r, self.s)

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the noise-free score at coordinates x, (N,) each."""
        if not len(self.X):
            return np.zeros(len(x)), np.full(len(x), math.sqrt(max(self.s, 1e-10)))
        k, _ = self._kernel(x, self.apart(x))
        v = self._inverse.dot(k)
        variance = self.s - np.einsum("nj,nj->j", v, v)
        return self._alpha.dot(k), np.sqrt(np.maximum(variance, 1e-10))

    def slope(self, x: np.ndarray, best: float | np.ndarray, apart: np.ndarray) -> np.ndarray:
        """Gradient of the log expected improvement over ``best`` at x, in x's shape.

        ``apart`` of x stays as it is on the way up: only ordered coordinates move.
        """
        k, slope = self._kernel(x, apart)
        v = self._inverse.dot(k)
        u: np.ndarray = self._inverse.T.dot(v)
        mean = self._alpha.dot(k)
        variance = self.s - np.einsum("nj,nj->j", v, v)
        deviation = np.sqrt(np.maximum(variance, 1e-10))
        gain = log_improvement(mean, deviation, best)
        # d k_i / d x_j = slope_i (X_ij - x_j) / l_j^2
        pull = self._alpha[:, None] * gain.by_mean
        u *= gain.by_deviation / deviation
        pull -= u
        pull *= slope
        gradient: np.ndarray = pull.T.dot(self.X) - pull.sum(0)[:, None] * x
        gradient *= self._pull
        return gradient

    @property
    def at_trials(self) -> np.ndarray:
        """The mean at the observations, shape (n,)."""
        return self._at_trials @ self._alpha

    def incumbent(self, eligible: np.ndarray, charged: np.ndarray | float = 0.0) -> float:
        """The best posterior mean, less what is charged, at an eligible observation, (n,) each."""
        return incumbent(self.at_trials - charged, eligible)

    def leave_one_out(self) -> np.ndarray:
        """Each score as the process predicts it from the others, shape (n,).

        Rasmussen & Williams 2006, eq. 5.12.
        """
        return self.y - self._alpha / np.einsum("ij,ij->j", self._inverse, self._inverse)

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


def factor(K: Tensor) -> Tensor:
    """Cholesky with a growing jitter where K is numerically singular."""
    L, info = torch.linalg.cholesky_ex(K)
    jitter = 1e-8
    while bool((info > 0).any()) and jitter < 1.0:
        eye = torch.eye(K.shape[-1], dtype=K.dtype)
        L, info = torch.linalg.cholesky_ex(K + jitter * (info > 0)[:, None, None] * eye)
        jitter *= 10.0
    return L


def incumbent(mean: np.ndarray, eligible: np.ndarray) -> float:
    """The best of the means at eligible trials, shape (n,) each; 0 without trials.

    Without an eligible one, what lies a deviation below the worst, so that every point promises
    to improve on it and only feasibility tells points apart.
    """
    if not len(mean):
        return 0.0
    return float(mean[eligible].max()) if eligible.any() else float(mean.min()) - 1.0


def _matern(r: np.ndarray, s: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s (1 + r + r^2 / 3) exp(-r) and s (1 + r) exp(-r); r holds sqrt(5) distances, then lost."""
    decay = np.exp(-r)
    decay *= s
    slope = r + 1.0
    slope *= decay
    r *= r
    r *= decay
    r /= 3.0
    r += slope
    return r, slope


def fit_theta(
    X: np.ndarray,
    y: np.ndarray,
    unordered: np.ndarray,
    log_l: np.ndarray,
    extra: np.ndarray,
    *,
    iterations: int,
    fit_rows: int,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Hyperparameters at the most probable place, shape (D + 2,).

    Args:
        X: coordinates.
        y: standardised scores.
        unordered: coordinates without order, shape (D,).
        log_l: prior mean and deviation of the log lengthscales, shape (D, 2).
        extra: noise variance known beforehand, shape (n,).
        iterations: gradient steps; 0 takes the prior's centre.
        fit_rows: fit on at most so many rows, evenly spread.
        start: hyperparameters to start from; by default two starts, the prior's centre and short
            lengthscales with little noise, the better result kept.
    """
    variances = np.array([LOG_S_PRIOR, LOG_V_PRIOR])
    prior = np.concatenate([log_l, variances])
    centre = prior[:, 0]
    if not iterations or not len(X):
        return centre
    rows = evenly(len(X), fit_rows)
    X, y, extra = X[rows], y[rows], extra[rows]
    difference = X[:, None, :] - X[None, :, :]
    sqd = difference * difference
    sqd = np.where(unordered, sqd > 1e-12, sqd).reshape(-1, X.shape[1])
    starts = np.stack([centre, centre - 1.0] if start is None else [start])
    best, values = _minimise(starts, sqd, y, extra, prior, iterations)
    found: np.ndarray = best[values.argmin()]
    return found


def evenly(n: int, most: int) -> np.ndarray:
    """At most so many of n rows, evenly spread."""
    rows: np.ndarray = torch.linspace(0, n - 1, min(n, most)).round().long().numpy()
    return rows


def _minimise(
    theta: np.ndarray,
    sqd: np.ndarray,
    y: np.ndarray,
    extra: np.ndarray,
    prior: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """iRprop- from theta (S, D + 2): the best parameters met and their values (S,)."""
    posterior = Posterior(sqd, y, extra, prior)
    step, previous = np.full(theta.shape, 0.3), np.zeros(theta.shape)
    best, best_value = theta.copy(), np.full(len(theta), math.inf)
    for _ in range(iterations):
        value, gradient = posterior.negative_log(theta)
        better = value < best_value
        np.copyto(best, theta, where=better[:, None])
        np.copyto(best_value, value, where=better)
        agreement = np.sign(gradient * previous).astype(np.int8)
        step = np.minimum(np.maximum(step * _GROWTH[agreement], 1e-3), 1.0)
        previous = gradient * (agreement >= 0)
        theta = theta - np.sign(previous) * step
        theta[:, -1] = np.minimum(np.maximum(theta[:, -1], LOG_V_MIN), 1.0)
    return best, best_value


class Posterior:
    """Of the hyperparameters: log marginal likelihood plus log prior.

    Args:
        sqd: squared differences, shape (n * n, D).
        y: scores.
        extra: noise variance known beforehand, shape (n,).
        prior: means and deviations, shape (D + 2, 2).
    """

    def __init__(
        self, sqd: np.ndarray, y: np.ndarray, extra: np.ndarray, prior: np.ndarray
    ) -> None:
        self._sqd, self._y, self._extra = 5.0 * sqd, y, extra
        self._across = np.ascontiguousarray(self._sqd.T)
        self._mean, self._precision = prior[:, 0], 1.0 / prior[:, 1]
        self._exponent = np.array([-2.0] * (len(prior) - 2) + [1.0, 1.0])

    def negative_log(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (S,) and gradients (S, D + 2) at theta (S, D + 2)."""
        S, n = len(theta), len(self._y)
        grown = np.exp(theta * self._exponent)
        w, s, v = grown[:, :-2], grown[:, -2, None], grown[:, -1]
        r: np.ndarray = w @ self._across
        r += _ZERO
        np.sqrt(r, out=r)
        M, slope = _matern(r, s)
        K = M.copy()
        K[:, :: n + 1] += v[:, None] + self._extra
        L, info = torch.linalg.cholesky_ex(torch.from_numpy(K).view(S, n, n))
        if info.numpy().any():
            L = factor(torch.from_numpy(K).view(S, n, n))
        # Symmetric, so that either order of its memory will do.
        W: np.ndarray = torch.cholesky_inverse(L).mT.contiguous().numpy()
        alpha = W @ self._y
        pivots = np.einsum("sii->si", L.numpy())
        value = 0.5 * (alpha @ self._y) + np.log(pivots).sum(1)
        W -= alpha[:, :, None] * alpha[:, None, :]  # dNLL/dK = W / 2
        W = W.reshape(S, n * n)
        slope *= W
        gradient = np.empty_like(theta)
        gradient[:, :-2] = (0.5 / 3.0) * (slope @ self._sqd) * w
        gradient[:, -2] = 0.5 * np.einsum("sk,sk->s", M, W)
        gradient[:, -1] = 0.5 * W[:, :: n + 1].sum(1) * v
        z = (theta - self._mean) * self._precision
        gradient += z * self._precision
        return value + 0.5 * np.einsum("sk,sk->s", z, z), gradient
