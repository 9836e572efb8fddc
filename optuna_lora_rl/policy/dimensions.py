"""The search space as the policy sees it: named dimensions, their roles, and the unit cube.

Notations
    d        number of dimensions of a space
    point    array of shape (d,): a configuration in the unit cube; NaN where a parameter is absent
    points   array of shape (n, d)
    level    index of a value of a discrete dimension, 0 ... n_levels - 1, in ascending order

A continuous dimension maps [low, high] to [0, 1], linearly or in the logarithm. A discrete one
(integers, stepped floats, choices) cuts [0, 1] into cells and stands at the centre of its cell,
so that a uniform point of the cube is a uniform configuration (integers on a logarithmic scale
keep cells of unequal width, as in Optuna). Choices that are all numbers are put in ascending
order: ``[8, 16, 32, 64]`` is an ordered dimension whatever order it was written in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from optuna_lora_rl.policy.roles import is_lora
from optuna_lora_rl.policy.roles import recognise

Choice = None | bool | int | float | str

_LARGEST = sys.float_info.max
# Beyond so many values the steps between them are finer than floating-point numbers.
_MOST_LEVELS = 2**53
_MOST_LOG = math.log(_LARGEST) - 1e-9
# How far beyond a range, in its widths, trials of an earlier range are told apart.
_REACH = 8.0


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _as_float(value: float) -> float:
    """A number, also a whole one that is too large for a float, as the nearest float."""
    return float(min(max(value, -_LARGEST), _LARGEST))


@dataclass(frozen=True)
class Dimension:
    """One tuned parameter and its place in the unit cube.

    Args:
        name: the parameter's name in the study.
        kind: ``"float"``, ``"int"`` or ``"categorical"``.
        low: smallest value (numeric kinds).
        high: largest value, included (numeric kinds).
        log: whether the scale is logarithmic; needs ``low > 0``.
        step: distance between neighbouring values, or ``None`` for a continuous float.
        choices: the values of a categorical parameter.
        role: what the parameter does in a LoRA run (see :mod:`~optuna_lora_rl.policy.roles`);
            ``None`` for no known role.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None
    choices: tuple[Choice, ...] = ()
    role: str | None = None
    # Of whole numbers low, high and step exactly: a float holds them up to 2 ** 53. Copies with
    # another role are handed it, since their low and high are floats already.
    _whole: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("float", "int", "categorical"):
            raise ValueError(f"dimension {self.name}: unknown kind {self.kind!r}")
        if self.kind == "categorical" and not self.choices:
            raise ValueError(f"dimension {self.name}: no choices")
        if self.kind != "categorical" and not self.low <= self.high:
            raise ValueError(f"dimension {self.name}: low {self.low} > high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"dimension {self.name}: a logarithmic scale needs low > 0")
        if self.kind == "int" and self._whole is None:
            whole = int(self.low), int(self.high), int(self.step or 1)
            object.__setattr__(self, "_whole", whole)
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_float(value))
        if self.kind == "int" and self.step is None:
            object.__setattr__(self, "step", 1.0)

    @cached_property
    def is_ordered(self) -> bool:
        """Whether distances along the dimension mean something."""
        return self.kind != "categorical" or all(_is_number(choice) for choice in self.choices)

    @cached_property
    def levels(self) -> tuple[Choice, ...]:
        """The choices, in ascending order when all are numbers."""
        if self.is_ordered:
            return tuple(sorted(self.choices, key=lambda choice: float(choice)))  # type: ignore[arg-type]
        return self.choices

    @cached_property
    def n_levels(self) -> int | None:
        """Number of distinct values, ``None`` when continuous or too many to tell apart."""
        if self.kind == "categorical":
            return len(self.choices)
        if self.step is None:
            return None if self.high > self.low else 1
        steps = (self.high / self._unit - self.low / self._unit) / (self.step / self._unit)
        return math.floor(steps + 1e-9) + 1 if steps < _MOST_LEVELS else None

    @cached_property
    def _unit(self) -> float:
        """What positions are divided by: a range may be wider than the largest float."""
        width = self.high - self.low + 2 * (self.step or 0.0)
        return 1.0 if self.log or width <= _LARGEST / 4 else 16.0

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """What 0 and 1 stand for, on the scale of the dimension (half a step beyond the ends)."""
        if self.kind == "categorical":
            return -0.5, len(self.choices) - 0.5
        half = 0.5 * (self.step or 0.0) / self._unit
        low, high = self.low / self._unit - half, self.high / self._unit + half
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def encode(self, value: Any) -> float:
        """The unit coordinate of a value.

        Numbers outside the range give coordinates outside [0, 1], so that trials of an earlier,
        wider range still teach, some widths away at most; what has no place here (unknown choice,
        absent) gives NaN.
        """
        if self.kind == "categorical":
            position = self._level_of(value)
        elif not _is_number(value) or (self.log and value <= 0):
            return math.nan
        else:
            position = math.log(value) if self.log else float(value) / self._unit
        low, high = self._bounds
        if high <= low:
            return 0.5
        return min(max((position - low) / (high - low), -_REACH), 1.0 + _REACH)

    def _level_of(self, value: Any) -> float:
        for level, choice in enumerate(self.levels):
            if choice is value or (type(choice) is type(value) and choice == value):
                return float(level)
        for level, choice in enumerate(self.levels):
            if choice == value or (choice != choice and value != value):
                return float(level)
        return math.nan

    def decode(self, coordinate: float) -> Any:
        """The value at a unit coordinate, as a native Python object inside the range."""
        low, high = self._bounds
        u = min(max(float(coordinate), 0.0), 1.0)
        position = low + u * (high - low)
        if self.kind == "categorical":
            return self.levels[min(max(round(position), 0), len(self.levels) - 1)]
        value = self._value(position)
        if self.kind == "int":
            return self._nearest_whole(u, value)
        if self.step is not None and self.n_levels is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
        elif u in (0.0, 1.0):  # exp(log(low)) misses low by a rounding error
            value = (self.low, self.high)[int(u)]
        return min(max(value, self.low), self.high)

    def _value(self, position: float) -> float:
        """The value at a position, inside the range."""
        value = math.exp(min(position, _MOST_LOG)) if self.log else position * self._unit
        return min(max(value, self.low), self.high)

    def _nearest_whole(self, u: float, value: float) -> int:
        assert self._whole is not None
        low, high, step = self._whole
        most = (high - low) // step
        if self.n_levels is None and not self.log:
            return low + min(int(u * _MOST_LEVELS) * (most + 1) // _MOST_LEVELS, most) * step
        assert self.step is not None
        return low + min(max(round((value - self.low) / self.step), 0), most) * step

    def natural(self, coordinates: np.ndarray) -> np.ndarray:
        """Values at many unit coordinates as floats, shape kept, without rounding to levels.

        Only ordered dimensions have natural values; between two numeric choices the value is
        interpolated.
        """
        low, high = self._bounds
        position = low + np.asarray(coordinates, dtype=float) * (high - low)
        if self.kind == "categorical":
            values = np.array([float(choice) for choice in self.levels])  # type: ignore[arg-type]
            return np.interp(position, np.arange(len(values)), values)
        if self.log:
            return np.exp(np.minimum(position, _MOST_LOG))
        limit = _LARGEST / self._unit
        return np.minimum(np.maximum(position, -limit), limit) * self._unit

    def snap(self, coordinates: np.ndarray) -> np.ndarray:
        """Move coordinates to the nearest place that some value has; NaN stays NaN."""
        u = np.asarray(coordinates, dtype=float)
        if self.n_levels is None:
            return np.minimum(np.maximum(u, 0.0), 1.0)
        low, high = self._bounds
        if high <= low:
            return np.where(np.isnan(u), u, 0.5)
        position = low + u * (high - low)
        if self.kind == "categorical":
            snapped = np.minimum(np.maximum(np.rint(position), 0), len(self.levels) - 1)
            return (snapped - low) / (high - low)
        assert self.step is not None
        first, last, step = (x / self._unit for x in (self.low, self.high, self.step))
        value = np.exp(position) if self.log else position
        value = first + np.rint((value - first) / step) * step
        value = np.minimum(np.maximum(value, first), last)
        return ((np.log(value) if self.log else value) - low) / (high - low)

    def grid(self, limit: int = 64) -> np.ndarray:
        """All coordinates of a discrete dimension, or ``limit`` even ones of a large one."""
        n = self.n_levels
        if self.kind == "categorical":
            return (np.arange(len(self.levels)) + 0.5) / len(self.levels)
        low, high = self._bounds
        if high <= low:
            return np.array([0.5])
        if n is not None and n <= limit:
            assert self.step is not None
            values = self.low / self._unit + np.arange(n) * (self.step / self._unit)
            return ((np.log(values) if self.log else values) - low) / (high - low)
        return np.unique(self.snap((np.arange(limit) + 0.5) / limit))


@dataclass(frozen=True)
class Space:
    """An ordered tuple of dimensions: the unit cube that a policy works in.

    Args:
        dimensions: in the order of the columns.
        said: whether somebody who knows says that it is a LoRA study's, whatever the names.
    """

    dimensions: tuple[Dimension, ...]
    said: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(dimension.name for dimension in self.dimensions))

    def __len__(self) -> int:
        return len(self.dimensions)

    @cached_property
    def written(self) -> str:
        """The space as text: a key even where choices are lists, and 0 is not False."""
        return repr(self)

    @cached_property
    def is_lora(self) -> bool:
        """Whether it is a LoRA study's: then the guides' prior applies."""
        return self.said or is_lora(self.names, self.role_columns)

    @cached_property
    def role_columns(self) -> dict[str, int]:
        """Column of each role that the space has (the first dimension that bears it)."""
        columns: dict[str, int] = {}
        for column, dimension in enumerate(self.dimensions):
            if dimension.role is not None:
                columns.setdefault(dimension.role, column)
        return columns

    @cached_property
    def is_categorical(self) -> np.ndarray:
        """Shape (d,): which dimensions have no order."""
        return np.array([not dimension.is_ordered for dimension in self.dimensions], dtype=bool)

    @cached_property
    def n_configurations(self) -> float:
        """How many configurations there are; infinite with a continuous dimension."""
        total = 1.0
        for dimension in self.dimensions:
            total *= math.inf if dimension.n_levels is None else dimension.n_levels
        return total

    def encode(self, params: Mapping[str, Any]) -> np.ndarray:
        """The point of a configuration, shape (d,); NaN where a parameter is absent."""
        point = np.full(len(self.dimensions), math.nan)
        for column, dimension in enumerate(self.dimensions):
            if dimension.name in params:
                point[column] = dimension.encode(params[dimension.name])
        return point

    def decode(self, point: Sequence[float] | np.ndarray) -> dict[str, Any]:
        """The configuration at a point, as native Python values, absent parameters left out."""
        return {
            dimension.name: dimension.decode(coordinate)
            for dimension, coordinate in zip(self.dimensions, point, strict=True)
            if coordinate == coordinate
        }

    def snap(self, points: np.ndarray) -> np.ndarray:
        """Move points, shape (..., d), onto configurations that exist."""
        snapped: np.ndarray = np.minimum(np.maximum(np.asarray(points, dtype=float), 0.0), 1.0)
        for column, dimension in enumerate(self.dimensions):
            if dimension.n_levels is not None:
                snapped[..., column] = dimension.snap(snapped[..., column])
        return snapped


def make_space(
    dimensions: Sequence[Dimension],
    roles: Mapping[str, str] | None = None,
    *,
    said: bool = False,
) -> Space:
    """A space whose dimensions know their roles, where it is a LoRA study's.

    Args:
        dimensions: in the order of the columns; roles they already carry are kept.
        roles: roles given by the user, by parameter name (``"none"`` for no role); they win
            over the recognised ones, and whoever gives one says that it is a LoRA study.
        said: whether somebody says so otherwise.
    """
    given = roles or {}
    named = []
    for dimension in dimensions:
        role = dimension.role or recognise(
            dimension.name, dimension.kind, dimension.low, dimension.high, dimension.choices
        )
        role = given.get(dimension.name, role)
        said |= given.get(dimension.name, "none") != "none"
        named.append(replace(dimension, role=None if role == "none" else role))
    space = Space(tuple(named), said)
    if space.is_lora:
        return space
    return Space(tuple(replace(dimension, role=None) for dimension in named))
