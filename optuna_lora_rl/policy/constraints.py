"""Constraints of a study: how likely a configuration is to keep them all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Points
from optuna_lora_rl.policy.scores import power
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import fit_theta

# Most units that a constraint is kept or broken by.
_FARTHEST = 3.0
# A constraint that only says kept or broken is taken as +1 or -1. Its limit may lie anywhere
# between the two, and improvement lures beyond it: a point has to look more like what was kept
# by so much, and that counts so many times.
_ALIKE, _CARE = 0.5, 8.0
# Log-probability that points keep the constraints, shape (N,).
Feasibility = Callable[[Points], np.ndarray]


def fit_feasibility(layout: Layout, trials: Trials, constraints: np.ndarray) -> Feasibility | None:
    """The log-probability that all constraints are kept, from a process for each of them.

    Args:
        layout: of the space.
        trials: of the study.
        constraints: values, feasible when all <= 0, shape (n, number of constraints); NaN where
            unknown.

    Returns:
        ``None`` without any known value (Gardner et al. 2014, constraints taken as independent).
    """
    models = []
    x = trials.points(layout).coordinates
    for column in constraints.T:
        known = ~np.isnan(column)
        if not known.any():
            continue
        y, X, none = room(column[known]), x[known], np.zeros(int(known.sum()))
        theta = fit_theta(X, y, layout.unordered, layout.log_l, none, iterations=40, fit_rows=100)
        models.append((is_flag(column[known]), Process(X, y, layout.unordered, theta, none)))

    def log_feasible(points: Points) -> np.ndarray:
        total = np.zeros(len(points))
        for flag, model in models:
            mean, deviation = model.posterior(points.coordinates)
            z = torch.from_numpy((mean - (_ALIKE if flag else 0.0)) / deviation)
            log_kept = torch.special.log_ndtr(z).numpy()
            total += _CARE * log_kept if flag else log_kept
        return np.maximum(total, -50.0)

    return log_feasible if models else None


def is_flag(values: np.ndarray) -> bool:
    """Whether the values of a constraint, shape (n,), only say kept or broken.

    Either there is none below 0, or one for all that keep it and one for all that break it.
    """
    over = values > 0
    # Of two trials each has its own value anyway.
    apart = len(values) > 2 and _alike(values[over]) and _alike(values[~over])
    return apart or not bool((values < 0).any())


def _alike(values: np.ndarray) -> bool:
    """Whether there are values, all the same."""
    return len(values) > 0 and bool(values.min() == values.max())


def room(values: np.ndarray) -> np.ndarray:
    """How much room the values of a constraint leave, about 1 in size, 0 at the limit, shape (n,).

    The unit is the root mean square, not the median: trials gather at the limit, and in a unit
    that shrinks with them the rest would look like a cliff. Where a constraint only says kept or
    broken, it is 1 or -1. Infinite values are as far as values can be.
    """
    if is_flag(values):
        return np.where(values > 0, -1.0, 1.0)
    size = np.abs(values[np.isfinite(values)])
    some = np.sort(size[size > 0])
    usual = some[(len(some) - 1) // 2] if len(some) else 0.0
    # Squares of values of any size must neither overflow nor vanish.
    about = power(usual)
    typical = size[size / 1e3 <= usual] / about
    unit = about * np.sqrt(np.square(typical).mean()) if usual else 1.0
    return -np.minimum(np.maximum(values / unit, -_FARTHEST), _FARTHEST)
