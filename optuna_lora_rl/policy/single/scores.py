"""From raw scores to what the surrogate learns from; the twin of ``scores.standardise``."""

from __future__ import annotations

import math

import numpy as np

from optuna_lora_rl.policy.scores import FAILURE_GAP


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
    known = np.sort(scores[good & np.isfinite(scores)])
    low, high = (known[0], known[-1]) if len(known) else (0.0, 0.0)
    clipped = np.where(good, scores, low)
    clipped = np.where(np.isnan(clipped), 0.0, clipped)
    clipped = np.minimum(np.maximum(clipped, low - (high - low)), high)
    median, quartile, upper = (_quantile(known, q) for q in (0.5, 0.25, 0.75))
    span = max(high - median, upper - quartile)
    if span > 0 and count >= 3:
        clipped = np.maximum(clipped, median - 3.0 * span)
    centred = np.where(good, clipped - clipped[good].sum() / count, 0.0)
    deviation = math.sqrt((centred * centred).sum() / count)
    flat = deviation <= 1e-12 * max(abs(high), 1e-300)
    y = np.zeros(len(scores)) if flat else centred / max(deviation, 1e-300)
    return np.where(failed, min(y[good].min(), -1.0) - FAILURE_GAP, y)


def _quantile(known: np.ndarray, q: float) -> float:
    """A quantile of sorted values, 0 without any."""
    if not len(known):
        return 0.0
    place = q * (len(known) - 1)
    left = int(place)
    right = min(left + 1, len(known) - 1)
    return float(known[left] + (known[right] - known[left]) * (place - left))
