"""From raw scores to what the surrogate learns from; the twin of ``scores.standardise``."""

from __future__ import annotations

import math

import numpy as np

from optuna_lora_rl.policy.scores import FAILURE_GAP
from optuna_lora_rl.policy.scores import JUMP
from optuna_lora_rl.policy.scores import REACH
from optuna_lora_rl.policy.scores import TOP


def standardise(scores: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Scores with mean 0 and deviation 1 over the trials that did not fail, shape (n,).

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
    """Where the bad tail is moved to, -inf for nowhere; the twin of ``scores._floor``."""
    n = len(known)
    behind = high - known[::-1][max(TOP - 1, n // 4) : 3 * n // 4 + 1]
    jump = (behind[:-1] > 0) & (behind[1:] > JUMP * behind[:-1])
    if jump.any():
        return float(high - REACH * behind[:-1][jump][0])
    median, quartile, upper = (_quantile(known, q) for q in (0.5, 0.25, 0.75))
    span = max(high - median, upper - quartile)
    return median - 3.0 * span if span > 0 and count >= 3 else -math.inf


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
