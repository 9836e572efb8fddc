"""A Gaussian process for many tasks at once: the sampler uses it for one, training for hundreds.

Notations
    B     tasks in the batch
    n     trials (padded), N candidates, D coordinates of the model
    X     observed coordinates, shape (B, n, D);  x: candidates, shape (B, N, D)
    y     standardised scores, larger is better, shape (B, n)
    mask  which rows of X are real, shape (B, n)
    log_l log lengthscales, shape (B, D)
    log_s log variance of the signal, shape (B,)
    log_v log variance of the noise, shape (B,)
    sqd   squared differences by coordinate, shape (B, n * n, D)
    L     Cholesky factor of K = s M + diag(v + extra), shape (B, n, n);  alpha = K^-1 y

Matérn 5/2 with one lengthscale a coordinate; a coordinate without order contributes 0 or 1.
Hyperparameters are the maximum a posteriori under log-normal priors, by iRprop- with the analytic
gradient (Rasmussen & Williams 2006, eq. 5.9; Blum & Riedmiller 2013 on Rprop for this use),
which needs no line search and so runs for all tasks of a batch in step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_V_MIN = math.log(1e-6)
_SQRT5 = math.sqrt(5.0)
# Log-normal priors of the variances, for scores with variance 1.
LOG_S_PRIOR = (0.0, 1.0)
LOG_V_PRIOR = (math.log(3e-3), 1.5)


@dataclass
class Lengthscales:
    """Log-normal prior of the lengthscales.

    Args:
        mean: of the logarithm, shape (B, D).
        deviation: of the logarithm, shape (B, D).
    """

    mean: Tensor
    deviation: Tensor


@dataclass
class Surrogate:
    """A fitted process; see the module's notations for the shapes."""

    X: Tensor
    mask: Tensor
    unordered: Tensor
    log_l: Tensor
    log_s: Tensor
    log_v: Tensor
    L: Tensor
    alpha: Tensor

    @property
    def theta(self) -> Tensor:
        """All hyperparameters, ``cat(log_l, log_s, log_v)``, shape (B, D + 2)."""
        return torch.cat([self.log_l, self.log_s[:, None], self.log_v[:, None]], 1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noise-free score at x, each of shape (B, N)."""
        k = self.log_s.exp()[:, None, None] * matern52(
            squared_distance(self.X, x, self.unordered, self.log_l)
        )
        k = k * self.mask[:, :, None]
        mean = (k * self.alpha[:, :, None]).sum(1)
        v = torch.linalg.solve_triangular(self.L, k, upper=False)
        variance = self.log_s.exp()[:, None] - (v * v).sum(1)
        return mean, variance.clamp_min(1e-10).sqrt()

    def slope(self, x: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Log expected improvement over ``best`` (B,) at x, shape (B, N), and its gradient.

        The gradient has the shape of x; it is 0 along coordinates without order.
        """
        s = self.log_s.exp()[:, None, None]
        r2 = squared_distance(self.X, x, self.unordered, self.log_l)
        r = _SQRT5 * (r2 + 1e-18).sqrt()
        decay = s * torch.exp(-r) * self.mask[:, :, None]
        k = (1.0 + r + r * r / 3.0) * decay
        u = torch.cholesky_solve(k, self.L)
        mean = (k * self.alpha[:, :, None]).sum(1)
        deviation = (s[:, 0] - (k * u).sum(1)).clamp_min(1e-10).sqrt()
        value = log_expected_improvement(mean, deviation, best[:, None])
        # d log EI = (Phi d mean + phi d deviation) / EI, in logarithms far below the best.
        z = (mean - best[:, None]) / deviation
        by_mean = (torch.special.log_ndtr(z) - value).exp()
        by_deviation = (-0.5 * z * z - 0.5 * math.log(2.0 * math.pi) - value).exp()
        # d k_i / d x_j = slope_i (X_ij - x_j) / l_j^2
        slope = (5.0 / 3.0) * (1.0 + r) * decay
        pull = slope * (
            by_mean[:, None] * self.alpha[:, :, None] - (by_deviation / deviation)[:, None] * u
        )
        gradient = pull.transpose(1, 2) @ self.X - pull.sum(1)[:, :, None] * x
        gradient = gradient * ((-2.0 * self.log_l).exp() * ~self.unordered)[:, None, :]
        return value, gradient

    def incumbent(self, eligible: Tensor) -> Tensor:
        """The best posterior mean at an eligible observation (B, n), shape (B,).

        Without any, what lies a deviation below the worst, so that every point promises to
        improve on it and only feasibility tells points apart.
        """
        mean, _ = self.posterior(self.X)
        best = torch.where(eligible, mean, -math.inf).amax(1)
        worst = torch.where(self.mask, mean, math.inf).amin(1) - 1.0
        best = torch.where(eligible.any(1), best, worst)
        return torch.where(self.mask.any(1), best, torch.zeros_like(best))


def squared_distance(a: Tensor, b: Tensor, unordered: Tensor, log_l: Tensor) -> Tensor:
    """Scaled squared distances between a (B, n, D) and b (B, N, D), shape (B, n, N)."""
    scale = (-log_l).exp()[:, None, :]
    ordered = ~unordered[:, None, :]
    p, q = a * scale * ordered, b * scale * ordered
    r2 = (p * p).sum(-1)[:, :, None] + (q * q).sum(-1)[:, None, :]
    r2 = (r2 - 2.0 * p @ q.transpose(1, 2)).clamp_min(0.0)
    for j in torch.nonzero(unordered.any(0)).flatten().tolist():
        differs = (a[:, :, None, j] - b[:, None, :, j]).abs() > 1e-6
        weight = (scale[:, 0, j] ** 2 * unordered[:, j])[:, None, None]
        r2 = r2 + weight * differs
    return r2


def matern52(r2: Tensor) -> Tensor:
    r = _SQRT5 * (r2 + 1e-18).sqrt()
    return (1.0 + r + r * r / 3.0) * torch.exp(-r)


def _squared_differences(X: Tensor, unordered: Tensor) -> Tensor:
    difference = X[:, :, None, :] - X[:, None, :, :]
    ordered = difference * difference
    sqd = torch.where(unordered[:, None, None, :], (ordered > 1e-12).to(X.dtype), ordered)
    return sqd.flatten(1, 2)


def factor(K: Tensor) -> Tensor:
    """Cholesky with a growing jitter where K is numerically singular."""
    L, info = torch.linalg.cholesky_ex(K)
    jitter = 1e-8 if K.dtype == torch.float64 else 1e-5
    while bool((info > 0).any()) and jitter < 1.0:
        eye = torch.eye(K.shape[-1], dtype=K.dtype)
        L, info = torch.linalg.cholesky_ex(K + jitter * (info > 0)[:, None, None] * eye)
        jitter *= 10.0
    return L


def _kernel(
    sqd: Tensor, both: Tensor, mask: Tensor, theta: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor]:
    """K, shape (B, n, n), and s dM/d(-log l_j) / (sqd_j / l_j^2), the factor of its gradient."""
    B, n = mask.shape
    w = (-2.0 * theta[:, :-2]).exp()
    r2 = (sqd @ w[:, :, None]).view(B, n, n)
    r = _SQRT5 * (r2 + 1e-18).sqrt()
    decay = theta[:, -2].exp()[:, None, None] * torch.exp(-r)
    K = (1.0 + r + r * r / 3.0) * decay * both
    noise = torch.where(mask, theta[:, -1].exp()[:, None] + extra, torch.ones_like(extra))
    K.diagonal(dim1=1, dim2=2).add_(noise)
    return K, (5.0 / 3.0) * (1.0 + r) * decay * both


def negative_log_posterior(
    theta: Tensor, sqd: Tensor, y: Tensor, mask: Tensor, extra: Tensor, prior: Lengthscales
) -> tuple[Tensor, Tensor]:
    """Negative log marginal likelihood plus negative log prior, and its gradient.

    Args:
        theta: ``cat(log_l, log_s, log_v)``, shape (B, D + 2).
        sqd: squared differences, shape (B, n * n, D).
        y: scores, 0 where masked out, shape (B, n).
        mask: real rows, shape (B, n).
        extra: noise variance known beforehand, added to the fitted one, shape (B, n).
        prior: of the lengthscales.

    Returns:
        values of shape (B,) and gradients of shape (B, D + 2).
    """
    B, n = mask.shape
    both = (mask[:, :, None] & mask[:, None, :]).to(y.dtype)
    K, slope = _kernel(sqd, both, mask, theta, extra)
    L = factor(K)
    K_inv = torch.cholesky_inverse(L)
    alpha = (K_inv @ y[:, :, None])[:, :, 0]
    value = 0.5 * (y * alpha).sum(1) + L.diagonal(dim1=1, dim2=2).log().sum(1)
    W = K_inv - alpha[:, :, None] * alpha[:, None, :]  # dNLL/dK = W / 2
    w = (-2.0 * theta[:, :-2]).exp()
    grad_l = 0.5 * ((slope * W).view(B, 1, n * n) @ sqd)[:, 0] * w
    noise = theta[:, -1].exp()
    diagonal = W.diagonal(dim1=1, dim2=2) * mask
    grad_v = 0.5 * diagonal.sum(1) * noise
    on_diagonal = diagonal * (theta[:, -2].exp()[:, None] - K.diagonal(dim1=1, dim2=2))
    grad_s = 0.5 * ((K * W * both).sum((1, 2)) + on_diagonal.sum(1))
    gradient = torch.cat([grad_l, grad_s[:, None], grad_v[:, None]], 1)
    mean = torch.cat(
        [prior.mean, theta.new_tensor([LOG_S_PRIOR[0], LOG_V_PRIOR[0]]).expand(B, 2)], 1
    )
    deviation = torch.cat(
        [prior.deviation, theta.new_tensor([LOG_S_PRIOR[1], LOG_V_PRIOR[1]]).expand(B, 2)], 1
    )
    z = (theta - mean) / deviation
    return value + 0.5 * (z * z).sum(1), gradient + z / deviation


def _minimise(
    theta: Tensor,
    sqd: Tensor,
    y: Tensor,
    mask: Tensor,
    extra: Tensor,
    prior: Lengthscales,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """iRprop- from theta: the best parameters met and their values."""
    step = torch.full_like(theta, 0.3)
    previous = torch.zeros_like(theta)
    best, best_value = theta.clone(), torch.full_like(theta[:, 0], math.inf)
    for _ in range(iterations):
        value, gradient = negative_log_posterior(theta, sqd, y, mask, extra, prior)
        better = value < best_value
        best = torch.where(better[:, None], theta, best)
        best_value = torch.where(better, value, best_value)
        agreement = gradient * previous
        step = torch.where(agreement > 0, step * 1.2, torch.where(agreement < 0, step * 0.5, step))
        step = step.clamp(1e-3, 1.0)
        gradient = torch.where(agreement < 0, torch.zeros_like(gradient), gradient)
        theta = theta - gradient.sign() * step
        theta[:, -1] = theta[:, -1].clamp(LOG_V_MIN, 1.0)
        previous = gradient
    return best, best_value


def fit(
    X: Tensor,
    y: Tensor,
    mask: Tensor,
    unordered: Tensor,
    prior: Lengthscales,
    *,
    extra: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 40,
    fit_rows: int | None = None,
) -> Surrogate:
    """Fit the hyperparameters and condition on the observations.

    Args:
        X: coordinates, shape (B, n, D); no NaN.
        y: standardised scores, shape (B, n).
        mask: real rows, shape (B, n).
        unordered: coordinates without order, shape (B, D).
        prior: of the lengthscales.
        extra: noise variance known beforehand (imputed scores), shape (B, n).
        start: hyperparameters to start from, shape (B, D + 2); by default two starts, the
            prior's centre and short lengthscales with little noise, the better result kept.
        iterations: gradient steps; 0 takes ``start`` (or the prior's centre) as it is.
        fit_rows: fit the hyperparameters on at most so many rows, evenly spread.
    """
    y = torch.where(mask, y, torch.zeros_like(y))
    extra = torch.zeros_like(y) if extra is None else extra
    centre = torch.cat(
        [prior.mean, y.new_tensor([LOG_S_PRIOR[0], LOG_V_PRIOR[0]]).expand(len(y), 2)], 1
    )
    theta = centre if start is None else start
    if iterations and X.shape[1]:
        n = X.shape[1]
        rows = torch.linspace(0, n - 1, min(n, fit_rows or n)).round().long()
        sqd = _squared_differences(X[:, rows], unordered)
        data = (sqd, y[:, rows], mask[:, rows], extra[:, rows])
        if start is None:
            # Both starts in one batch: the steps' overhead is most of what small fits cost.
            rough = torch.cat([prior.mean - 1.0, centre[:, -2:] - 1.0], 1)
            twice = Lengthscales(prior.mean.repeat(2, 1), prior.deviation.repeat(2, 1))
            sqd, rows_y, real, known = (torch.cat([tensor, tensor]) for tensor in data)
            both, values = _minimise(
                torch.cat([theta, rough]), sqd, rows_y, real, known, twice, iterations
            )
            (theta, other), (value, other_value) = both.chunk(2), values.chunk(2)
            theta = torch.where((other_value < value)[:, None], other, theta)
        else:
            theta, _ = _minimise(theta, *data, prior, iterations)
    return condition(X, y, mask, unordered, theta, extra)


def condition(
    X: Tensor, y: Tensor, mask: Tensor, unordered: Tensor, theta: Tensor, extra: Tensor
) -> Surrogate:
    """The process with hyperparameters ``theta`` given the observations."""
    log_l, log_s, log_v = theta[:, :-2], theta[:, -2], theta[:, -1]
    both = (mask[:, :, None] & mask[:, None, :]).to(y.dtype)
    K = log_s.exp()[:, None, None] * matern52(squared_distance(X, X, unordered, log_l)) * both
    noise = torch.where(mask, log_v.exp()[:, None] + extra, torch.ones_like(extra))
    # The diagonal of the distances is 0 up to rounding; set it exactly.
    K = K - torch.diag_embed(K.diagonal(dim1=1, dim2=2))
    K = K + torch.diag_embed(log_s.exp()[:, None] * mask + noise)
    L = factor(K)
    y = torch.where(mask, y, torch.zeros_like(y))
    alpha = torch.cholesky_solve(y[:, :, None], L)[:, :, 0]
    return Surrogate(X, mask, unordered, log_l, log_s, log_v, L, alpha)


def believe(
    surrogate: Surrogate, y: Tensor, extra: Tensor, x: Tensor, pending: Tensor
) -> Surrogate:
    """Condition also on running trials, taken to end at their predicted mean.

    The mean stays, the deviation shrinks round the running trials, so that several workers do
    not propose the same point ("kriging believer", Ginsbourger et al. 2010).

    Args:
        surrogate: fitted to the finished trials.
        y: their scores, shape (B, n).
        extra: their known noise variance, shape (B, n).
        x: coordinates of running trials, shape (B, m, D).
        pending: which of them are real, shape (B, m).
    """
    mean, _ = surrogate.posterior(x)
    return condition(
        torch.cat([surrogate.X, x], 1),
        torch.cat([y, mean], 1),
        torch.cat([surrogate.mask, pending], 1),
        surrogate.unordered,
        surrogate.theta,
        torch.cat([extra, torch.zeros_like(mean)], 1),
    )


def log_expected_improvement(mean: Tensor, deviation: Tensor, best: Tensor) -> Tensor:
    """Log of E[max(f - best, 0)] for f ~ N(mean, deviation^2), accurate far below the best.

    Ament et al. 2023, "Unexpected Improvements to Expected Improvement", eq. 8-9.
    """
    z = (mean - best) / deviation
    near = z.clamp_min(-1.0)
    phi = torch.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    upper = (phi + near * 0.5 * torch.erfc(-near / math.sqrt(2.0))).log()
    far = z.clamp_max(-1.0)
    ratio = torch.special.erfcx(-far / math.sqrt(2.0)) * far.abs() * math.sqrt(0.5 * math.pi)
    # For z -> -inf ratio -> 1 - 1/z^2: below -1e3 the difference is lost to rounding.
    gap = torch.where(far > -1e3, (1.0 - ratio).clamp_min(1e-30), 1.0 / (far * far))
    lower = -0.5 * far * far - 0.5 * math.log(2.0 * math.pi) + gap.log()
    return torch.where(z > -1.0, upper, lower) + deviation.log()
