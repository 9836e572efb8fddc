"""From raw scores to what the surrogate can learn from.

Notations
    B, n      tasks and finished trials
    scores    larger is better, shape (B, n)
    good      trials with a score of their own, shape (B, n)
    failed    trials that ended without one, shape (B, n)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# How far below the worst standardised score a failed trial stands.
FAILURE_GAP = 0.25
# Where many trials diverged, to values that no span of the rest explains, quartiles say nothing of
# the good ones. It shows in a jump, between the upper quartile (at least the TOP-th best) and the
# lower one, to JUMP times as far below the best: what is beyond it is moved to REACH times as far
# as what is before it. A search that closes in on an optimum leaves values at all distances.
TOP, JUMP, REACH = 3, 100.0, 3.0


def standardise(scores: Tensor, good: Tensor, failed: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 over the good trials, the bad tail drawn in.

    A diverged run can be a million times worse than the rest. What lies further below the median
    than three times the span of the good half is moved there (and infinities with it), so that
    the scale is set by the configurations worth telling apart. Failed trials get a score a
    little below the worst, and at most -1.

    Returns:
        shape (B, n); 0 where neither good nor failed.
    """
    if not scores.shape[1]:
        return scores
    finite = good & torch.isfinite(scores)
    zero = torch.zeros_like(scores)
    scores = scores / power(torch.where(finite, scores.abs(), zero).amax(1, keepdim=True))
    known = torch.where(finite, scores, torch.nan)
    high = torch.where(finite, scores, -torch.inf).amax(1, keepdim=True)
    low = torch.where(finite, scores, torch.inf).amin(1, keepdim=True)
    some = finite.any(1, keepdim=True)
    high, low = torch.where(some, high, 0.0), torch.where(some, low, 0.0)
    clipped = torch.where(good, scores, low).nan_to_num(nan=0.0)
    clipped = torch.minimum(torch.maximum(clipped, low - (high - low)), high)
    clipped = torch.maximum(clipped, _floor(known, low, high, good))
    weight = good.to(scores.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1.0)
    mean = (clipped * weight).sum(1, keepdim=True) / count
    centred = (clipped - mean) * weight
    unit = power(centred.abs().amax(1, keepdim=True))
    centred = centred / unit
    deviation = ((centred * centred).sum(1, keepdim=True) / count).sqrt()
    flat = deviation * unit <= 1e-12 * high.abs()
    y = torch.where(flat, zero, centred / deviation)
    worst = torch.where(good, y, zero).amin(1, keepdim=True)
    return torch.where(failed, worst.clamp_max(-1.0) - FAILURE_GAP, y)


def _floor(known: Tensor, low: Tensor, high: Tensor, good: Tensor) -> Tensor:
    """Where the bad tail is moved to, -inf for nowhere, shape (B, 1).

    Args:
        known: finite scores, NaN elsewhere, shape (B, n).
        low: the lowest of them, shape (B, 1).
        high: the highest.
        good: trials with a score of their own, shape (B, n).
    """
    median, quartile, upper = _quantiles(known, low)
    span = torch.maximum(high - median, upper - quartile)
    use = (span > 0) & (good.sum(1, keepdim=True) >= 3)
    usual = torch.where(use, median - 3.0 * span, -torch.inf)
    n = known.isfinite().sum(1, keepdim=True)
    place = torch.arange(known.shape[1] - 1)
    among = (place >= (n // 4).clamp_min(TOP - 1)) & (place < 3 * n // 4)
    behind = high - known.nan_to_num(nan=-torch.inf).sort(1, descending=True).values
    before = behind[:, :-1]
    jump = among & (before > 0) & (behind[:, 1:] > JUMP * before)
    step = torch.where(jump, before, torch.inf)
    step = torch.cat([step, torch.full_like(high, torch.inf)], 1).amin(1, keepdim=True)
    return torch.where(step.isfinite(), high - REACH * step, usual)


def power(size: Tensor) -> Tensor:
    """The power of two about each size, 1 for 0: dividing by it changes no digit."""
    return torch.where(size > 0, size / (2.0 * torch.frexp(size).mantissa), 1.0)


def _quantiles(known: Tensor, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    levels = torch.tensor([0.5, 0.25, 0.75], dtype=known.dtype)
    values = torch.nanquantile(known, levels, dim=1, keepdim=True)
    median, quartile, upper = (torch.where(v.isnan(), otherwise, v) for v in values)
    return median, quartile, upper


def scalarise(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One score from several objectives, shape (n,), by an augmented Tchebycheff distance.

    Each objective is first scaled to [0, 1] over the trials that no other dominates, so that
    weights mean the same whatever the units; with random weights the maxima cover the whole
    Pareto front, also where it is not convex (Knowles 2006, "ParEGO", eq. 2).

    Args:
        scores: larger is better, shape (n, m); no NaN.
        weights: at least 0, summing to 1, shape (m,).
    """
    if len(scores) == 0:
        return np.zeros(0)
    scores = np.clip(scores, -1e300, 1e300)
    front = scores[_non_dominated(scores)]
    low, high = front.min(axis=0), front.max(axis=0)
    whole = scores.max(axis=0) - np.median(scores, axis=0)
    span = np.where(high - low > 0, high - low, np.where(whole > 0, whole, 1.0))
    shortfall = weights * (high - scores) / span
    return -(shortfall.max(axis=1) + 0.05 * shortfall.sum(axis=1))


def _non_dominated(scores: np.ndarray) -> np.ndarray:
    """Shape (n,): trials that no other trial dominates."""
    at_least = np.all(scores[None] >= scores[:, None], axis=2)
    more = np.any(scores[None] > scores[:, None], axis=2)
    return np.asarray(~np.any(at_least & more, axis=1))
