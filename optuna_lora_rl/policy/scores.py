"""From raw scores to what the surrogate can learn from."""

from __future__ import annotations

import math

import numpy as np

# How far below the worst standardised score a failed trial stands.
FAILURE_GAP = 0.25
# Where many trials diverged, to values that no span of the rest explains, quartiles say nothing of
# the good ones. It shows in a jump, between the upper quartile (at least the TOP-th best) and the
# lower one, to JUMP times as far below the best: what is beyond it is moved to REACH times as far
# as what is before it. A search that closes in on an optimum leaves values at all distances.
TOP, JUMP, REACH = 3, 100.0, 3.0


def standardise(scores: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Scores with mean 0 and deviation 1 over the trials that did not fail, the bad tail drawn in.

    A diverged run can be a million times worse than the rest. What lies further below the median
    than three times the span of the good half is moved there (and infinities with it), so that
    the scale is set by the configurations worth telling apart. Failed trials get a score a
    little below the worst, and at most -1.

    Args:
        scores: larger is better, shape (n,).
        failed: trials without a score of their own, shape (n,).
    """
    good = ~failed
    count = int(good.sum())
    if not count:
        return np.where(failed, -1.0 - FAILURE_GAP, 0.0)
    finite = good & np.isfinite(scores)
    scores = scores / power(np.abs(scores[finite]).max(initial=0.0))
    known = np.sort(scores[finite])
    low, high = (known[0], known[-1]) if len(known) else (0.0, 0.0)
    clipped = np.where(good, scores, low)
    clipped = np.where(np.isnan(clipped), 0.0, clipped)
    clipped = np.minimum(np.maximum(clipped, low - (high - low)), high)
    clipped = np.maximum(clipped, _floor(known, high, count))
    centred = np.where(good, clipped - clipped[good].sum() / count, 0.0)
    unit = power(np.abs(centred).max())
    centred = centred / unit
    deviation = math.sqrt((centred * centred).sum() / count)
    flat = deviation * unit <= 1e-12 * abs(high)
    y = np.zeros(len(scores)) if flat else centred / deviation
    return np.where(failed, min(y[good].min(), -1.0) - FAILURE_GAP, y)


def _floor(known: np.ndarray, high: float, count: int) -> float:
    """Where the bad tail of known scores, sorted, is moved to, -inf for nowhere."""
    n = len(known)
    behind = high - known[::-1][max(TOP - 1, n // 4) : 3 * n // 4 + 1]
    jump = (behind[:-1] > 0) & (behind[1:] > JUMP * behind[:-1])
    if jump.any():
        return float(high - REACH * behind[:-1][jump][0])
    median, quartile, upper = (_quantile(known, q) for q in (0.5, 0.25, 0.75))
    span = max(high - median, upper - quartile)
    return median - 3.0 * span if span > 0 and count >= 3 else -math.inf


def unit(scores: np.ndarray, y: np.ndarray, failed: np.ndarray) -> float | None:
    """What a standardised score's unit is worth in scores; ``None`` without two different ones.

    The two best tell: it is only the bad ones that standardising draws in.
    """
    told = np.where(failed, -math.inf, y)
    if not len(told):
        return None
    best = int(told.argmax())
    lower = np.where(told < told[best] - 1e-9, told, -math.inf)
    second = int(lower.argmax())
    if not (math.isfinite(lower[second]) and np.isfinite(scores[[best, second]]).all()):
        return None
    return float((scores[best] - scores[second]) / (y[best] - y[second]))


def power(size: float) -> float:
    """The power of two about a size, 1 for 0: dividing by it changes no digit."""
    return float(size / (2.0 * np.frexp(size)[0])) if size > 0 else 1.0


def _quantile(known: np.ndarray, q: float) -> float:
    """A quantile of sorted values, 0 without any."""
    if not len(known):
        return 0.0
    place = q * (len(known) - 1)
    left = int(place)
    right = min(left + 1, len(known) - 1)
    return float(known[left] + (known[right] - known[left]) * (place - left))


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
