"""Which parameters a configuration does not use, as far as the trials show.

Notations
    n, d      trials and columns
    points    configurations in the unit cube, shape (n, d)
    asked     which parameters a trial's objective asked for, shape (n, d)

A define-by-run objective asks for ``dora_scale`` only where ``use_dora`` is true, and nobody says
so beforehand. Two configurations that differ in what is not used are the same one: they are told
apart neither by the surrogate nor when repeats are looked for, once unused columns stand at one
place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SAME = 1e-6


@dataclass(frozen=True)
class Condition:
    """A column that is not used where another one has certain values.

    Args:
        column: the conditional one.
        switch: the column that decides.
        off: coordinates of ``switch`` at which ``column`` is not used.
    """

    column: int
    switch: int
    off: tuple[float, ...]


def learn_conditions(
    points: np.ndarray, asked: np.ndarray, discrete: np.ndarray
) -> tuple[Condition, ...]:
    """One condition for each column that some trials asked for and others did not.

    A switch is a discrete column (shape (d,)) that every trial asked for and whose values tell
    without exception whether the conditional column was asked for. Where trials are few, a
    wrong switch may do so as well: the next trial that it is wrong for takes it off the list.
    """
    found = []
    always = asked.all(axis=0)
    for column in np.flatnonzero(asked.any(axis=0) & ~always):
        used = asked[:, column]
        for switch in np.flatnonzero(always & discrete):
            on, off = set(points[used, switch].round(6)), set(points[~used, switch].round(6))
            if not on & off:
                found.append(Condition(int(column), int(switch), tuple(sorted(off))))
                break
    return tuple(found)


def settle(
    points: np.ndarray, conditions: tuple[Condition, ...], default: np.ndarray
) -> np.ndarray:
    """Points, shape (..., d), with unused columns at their ``default``, shape (d,)."""
    settled = points
    for condition in conditions:
        place = settled[..., condition.switch, None]
        unused = (np.abs(place - np.array(condition.off)) < _SAME).any(axis=-1)
        if unused.any():
            settled = settled.copy() if settled is points else settled
            settled[..., condition.column][unused] = default[condition.column]
    return settled
