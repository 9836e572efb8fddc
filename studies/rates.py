"""Each arm at its own best learning rate, and differences between arms with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from scipy import stats


def search(
    quality: Callable[[float], float], start: Sequence[float], factor: float, most: int
) -> dict[float, float]:
    """Try learning rates, and go on past the end at which the best one stands.

    Args:
        quality: Of a rate.
        start: Tried in any case; a geometric sequence in rising order.
        factor: From one rate to the next.
        most: Rates that are tried at most.

    Returns:
        The qualities of all that were tried, by rate in rising order.
    """
    found = {rate: quality(rate) for rate in start}
    while len(found) < most:
        rates = sorted(found)
        best = max(rates, key=lambda rate: found[rate])
        if best == rates[0]:
            new = rates[0] / factor
        elif best == rates[-1]:
            new = rates[-1] * factor
        else:
            break
        new = rounded(new)
        found[new] = quality(new)
    return dict(sorted(found.items()))


def rounded(rate: float) -> float:
    """Two digits, so that a rate can be read and written."""
    return float(f"{rate:.1e}")


def best(qualities: Mapping[float, float]) -> float:
    """The rate of the largest quality."""
    return max(qualities, key=lambda rate: qualities[rate])


def over_seeds(values: Sequence[float], level: float = 0.95) -> list[float]:
    """Return a mean and its interval by Student's t.

    With so few seeds a bootstrap's intervals are too narrow.
    """
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return [mean, -math.inf, math.inf]
    half = float(
        stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    )
    return [mean, mean - half, mean + half]


def differences(
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Return the mean differences of paired values, by task and over all tasks, with intervals.

    The tasks are fixed, seeds vary: over all tasks the values are means over the tasks, by seed.

    Args:
        ours: By task, one value a seed.
        theirs: The same, of the same seeds.
        level: Of the intervals.
    """
    gaps = {task: np.subtract(ours[task], theirs[task]) for task in ours}
    found = {task: over_seeds(gap.tolist(), level) for task, gap in gaps.items()}
    return {**found, "all": over_seeds(np.mean(list(gaps.values()), axis=0).tolist(), level)}


def verdict(interval: Sequence[float]) -> str:
    """Says on which side of zero an interval lies."""
    _, low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"
