"""Discrete levels: the unit cube of a space cut into a few values per dimension.

Notations
    d        number of dimensions
    arms     for each dimension an ascending array of the unit coordinates of its levels
    cell     array of shape (d,), ints: a configuration as the index of a level per dimension;
             -1 where a parameter is absent
    cells    array of shape (n, d)

Ranks, alphas and batch sizes get powers of two; other scales get evenly spaced levels, ends
included, so a learning rate on a logarithmic scale gets a constant factor between levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space

# A parameter's levels: how many, or which values.
Levels = int | Sequence[Any]

_POWERS_OF_TWO = ("rank", "alpha", "batch_size")
_N_LEVELS = 7
_N_POWERS = 12
_SMALLEST_POWER = 2.0**-20


@dataclass(frozen=True)
class Grid:
    """A space whose dimensions have a few levels each.

    Args:
        space: the space.
        arms: unit coordinates of the levels, one ascending array per dimension.
    """

    space: Space
    arms: tuple[np.ndarray, ...]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of levels of each dimension, shape (d,)."""
        return np.array([len(arms) for arms in self.arms], dtype=int)

    def points(self, cells: np.ndarray) -> np.ndarray:
        """The unit coordinates of cells, shape (n, d); NaN where a parameter is absent."""
        columns = [
            np.where(cells[:, j] < 0, math.nan, arms[cells[:, j]])
            for j, arms in enumerate(self.arms)
        ]
        return np.stack(columns, axis=1)

    def cells(self, points: np.ndarray) -> np.ndarray:
        """The nearest level of each coordinate, shape (n, d).

        A value outside the range (of an earlier run with another range) belongs to no level.
        """
        cells = np.full(points.shape, -1, dtype=int)
        for j, arms in enumerate(self.arms):
            column = points[:, j]
            inside = (column >= -1e-9) & (column <= 1.0 + 1e-9)
            distance = np.abs(column[inside, None] - arms[None, :])
            cells[inside, j] = distance.argmin(axis=1)
        return cells

    def exactly(self, points: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Whether points stand on their cells and lack no parameter, shape (n,)."""
        complete = (cells >= 0).all(axis=1)
        nearest = self.points(cells)
        return complete & (np.abs(np.nan_to_num(points) - np.nan_to_num(nearest)) < 1e-9).all(1)

    def random(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform cells, shape (n, d)."""
        return np.stack([rng.integers(size, size=n) for size in self.sizes], axis=1)

    def neighbours(self, cell: np.ndarray) -> np.ndarray:
        """All cells that differ from ``cell`` in one dimension."""
        changed = []
        for j, size in enumerate(self.sizes):
            others = np.repeat(cell[None, :], size, axis=0)
            others[:, j] = np.arange(size)
            changed.append(others[np.arange(size) != cell[j]])
        return np.concatenate(changed)


def make_grid(space: Space, levels: Levels | Mapping[str, Levels] | None = None) -> Grid:
    """Cut every dimension of a space into levels.

    Args:
        space: the space.
        levels: how many levels a range gets at most; or by parameter name how many, or which
            values. Without a word a range gets seven, or its powers of two. Parameters with few
            values, and choices, keep them all.

    Raises:
        ValueError: none of the values given for a parameter lies in its range.
    """
    arms = []
    for dimension in space.dimensions:
        wanted = levels.get(dimension.name) if isinstance(levels, Mapping) else levels
        if wanted is None or isinstance(wanted, int):
            arms.append(_spaced(dimension, wanted))
        else:
            arms.append(_given(dimension, wanted))
    return Grid(space, tuple(arms))


def _given(dimension: Dimension, values: Sequence[Any]) -> np.ndarray:
    coordinates = np.array([dimension.encode(value) for value in values], dtype=float)
    inside = coordinates[(coordinates >= -1e-9) & (coordinates <= 1.0 + 1e-9)]
    if len(inside) == 0:
        allowed = (
            f"one of {list(dimension.choices)}"
            if dimension.kind == "categorical"
            else f"between {dimension.low:g} and {dimension.high:g}"
        )
        raise ValueError(
            f"levels of {dimension.name!r} are {list(values)}, but at least one must be {allowed}"
        )
    return np.unique(dimension.snap(inside))


def _spaced(dimension: Dimension, wanted: int | None) -> np.ndarray:
    n = wanted or _N_LEVELS
    is_short = dimension.step is not None and (dimension.n_levels or 0) <= n
    if dimension.kind == "categorical" or is_short:
        return dimension.grid(n)
    if dimension.role in _POWERS_OF_TWO:
        first = math.ceil(math.log2(max(dimension.low, _SMALLEST_POWER)))
        last = math.floor(math.log2(max(dimension.high, _SMALLEST_POWER)))
        powers = np.array([dimension.encode(2.0**k) for k in range(first, last + 1)])
        if 2 <= len(powers) <= (wanted or _N_POWERS):
            return np.unique(dimension.snap(powers))
    return np.unique(dimension.snap(np.linspace(0.0, 1.0, n)))
