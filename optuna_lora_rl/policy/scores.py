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
    known = torch.where(finite, scores, torch.nan)
    high = torch.where(finite, scores, -torch.inf).amax(1, keepdim=True)
    low = torch.where(finite, scores, torch.inf).amin(1, keepdim=True)
    some = finite.any(1, keepdim=True)
    high, low = torch.where(some, high, 0.0), torch.where(some, low, 0.0)
    clipped = torch.where(good, scores, low).nan_to_num(nan=0.0)
    clipped = torch.minimum(torch.maximum(clipped, low - (high - low)), high)
    median, quartile, upper = _quantiles(known, low)
    span = torch.maximum(high - median, upper - quartile)
    use = (span > 0) & (good.sum(1, keepdim=True) >= 3)
    clipped = torch.where(use, torch.maximum(clipped, median - 3.0 * span), clipped)
    weight = good.to(scores.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1.0)
    mean = (clipped * weight).sum(1, keepdim=True) / count
    centred = (clipped - mean) * weight
    deviation = ((centred * centred).sum(1, keepdim=True) / count).sqrt()
    flat = deviation <= 1e-12 * high.abs().clamp_min(1e-300)
    y = torch.where(flat, torch.zeros_like(centred), centred / deviation.clamp_min(1e-300))
    worst = torch.where(good, y, torch.zeros_like(y)).amin(1, keepdim=True)
    return torch.where(failed, worst.clamp_max(-1.0) - FAILURE_GAP, y)


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
