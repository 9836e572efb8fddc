"""Means, paired bootstrap intervals, ranks and wins.

Notations
    P, S, T   problems, seeds, trials
    curve     regret of the best configuration so far, shape (P, S, T)
    draws     of the bootstrap, DRAWS

An interval is the 2.5% and 97.5% quantile of the mean over DRAWS resamplings: problems with
replacement, then the seeds of each (the hierarchical bootstrap of Davison & Hinkley 1997, sec.
3.8). Problems that share a surface are one cluster and come and go together: they are no
independent evidence. Equal shapes are resampled equally, so what was paired stays paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict

import numpy as np
from scipy.stats import rankdata

DRAWS = 10_000
# Regret below which it does not matter how small it is, in logarithms.
FLOOR = 0.01
# Difference of regret that is neither won nor lost.
TIE = 0.01


class Interval(TypedDict):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


@lru_cache(maxsize=4)
def _weights(clusters: tuple[int, ...], seeds: int) -> np.ndarray:
    """Share of every study in every resampling, shape (DRAWS, P * S)."""
    rng = np.random.default_rng(0)
    _, cluster = np.unique(clusters, return_inverse=True)
    C = int(cluster.max()) + 1
    chosen = rng.integers(C, size=(DRAWS, C, 1))
    drawn = chosen * seeds + rng.integers(seeds, size=(DRAWS, C, seeds))
    places = np.arange(DRAWS)[:, None] * (C * seeds) + drawn.reshape(DRAWS, -1)
    times = np.bincount(places.ravel(), minlength=DRAWS * C * seeds).reshape(DRAWS, C, seeds)
    weights = times[:, cluster].reshape(DRAWS, -1).astype(float)
    return weights / weights.sum(1, keepdims=True)


def resampled(values: np.ndarray, clusters: Sequence[int] | None = None) -> np.ndarray:
    """Means of resampled values (P, S, ...), shape (DRAWS, ...).

    Args:
        values: by problem and seed.
        clusters: which problems belong together, shape (P,); by default none do.
    """
    P, S = values.shape[:2]
    weights = _weights(tuple(range(P)) if clusters is None else tuple(clusters), S)
    return (weights @ values.reshape(P * S, -1)).reshape(DRAWS, *values.shape[2:])


def interval(values: np.ndarray, clusters: Sequence[int] | None = None) -> Interval:
    """Mean of values (P, S) with its interval; see :func:`resampled`."""
    low, high = np.quantile(resampled(values, clusters), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def log_regret(regret: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    """log10 of the regret, which is no smaller than ``floor`` for it."""
    return np.log10(regret + floor)


def ranks(curves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rank of each sampler in every study at every trial, 1 the best, ties shared: (P, S, T)."""
    # Rounded, so that equal configurations tie.
    stacked = rankdata(np.round(np.stack(list(curves.values())), 4), axis=0)
    return dict(zip(curves, stacked, strict=True))


def reaches(
    curve: np.ndarray, target: float, clusters: Sequence[int] | None = None
) -> tuple[int | None, int | None, int | None]:
    """The trial after which the mean regret is at most ``target``, and its interval.

    None is beyond the last trial.
    """

    def first(means: np.ndarray) -> np.ndarray:
        """Shape (...) from (..., T); T + 1 for never."""
        there = means <= target + 1e-12
        return np.where(there.any(-1), there.argmax(-1) + 1, there.shape[-1] + 1)

    found = int(first(curve.mean((0, 1))))
    low, high = np.quantile(first(resampled(curve, clusters)), [0.025, 0.975])
    numbers = (found, round(float(low)), round(float(high)))
    last = curve.shape[2]
    return tuple(None if k > last else k for k in numbers)  # type: ignore[return-value]


def wins(reference: np.ndarray, other: np.ndarray) -> tuple[int, int, int]:
    """Problems that the reference won, tied and lost, by mean regrets over seeds (P, S)."""
    difference = other.mean(1) - reference.mean(1)
    won, lost = int((difference > TIE).sum()), int((difference < -TIE).sum())
    return won, len(difference) - won - lost, lost
