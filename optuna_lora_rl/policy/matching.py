"""Configurations of one search space placed in another: by name, then by role, on natural scales.

Notations
    d        dimensions of the target space
    points   shape (n, d): configurations of the source in the target's unit cube; NaN where the
             source says nothing about a dimension
    shared   shape (d,): dimensions about which the source says enough to learn from

A source may have other parameters, other ranges and other scales: values are compared, not
coordinates. What lies outside the target's range keeps its place outside the cube, at most one
range away, so that a process fitted to it still knows where the cube's border leads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import coverage

# Reads one target dimension's value out of a source's configuration; None where it has none.
_Read = Callable[[Mapping[str, Any]], Any]

# A dimension is shared when so many of the source's values lie in its range: below that, what is
# said about it (other units, another regime) would be hearsay.
_IN_RANGE = 0.2
_OUTSIDE = 1.0
# Two choices of module names adapt about the same share of a model.
_SAME_COVERAGE = 0.1


def place(
    target: Space, source: Space, params: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """The points of a source's configurations in the target's cube, and the shared dimensions.

    Args:
        target: the space to place them in.
        source: the space that they come from, with its roles.
        params: the configurations.
    """
    points = np.full((len(params), len(target)), math.nan)
    shared = np.zeros(len(target), dtype=bool)
    for column, dimension in enumerate(target.dimensions):
        read = _reader(dimension, target, source)
        if read is None:
            continue
        values = [read(configuration) for configuration in params]
        points[:, column] = _coordinates(dimension, values)
        told = points[~np.isnan(points[:, column]), column]
        inside = np.mean((told > -0.05) & (told < 1.05)) if len(told) else 0.0
        shared[column] = inside >= _IN_RANGE
    rank, alpha = (target.role_columns.get(role) for role in ("rank", "alpha"))
    if rank is not None and alpha is not None and not shared[rank]:
        shared[alpha] = False  # alpha means little without the rank that it is divided by
    return points, shared


def _reader(dimension: Dimension, target: Space, source: Space) -> _Read | None:
    """How to read the dimension's value from the source's configurations, if they have it."""
    for other in source.dimensions:
        if other.name == dimension.name and other.is_ordered == dimension.is_ordered:
            return _named(other.name)
    roles = source.role_columns
    if dimension.role is None:
        return None
    if dimension.role in roles:
        other = source.dimensions[roles[dimension.role]]
        if other.is_ordered == dimension.is_ordered and other.name not in target.names:
            return _named(other.name)
    if "rank" in roles and dimension.role == "alpha" and "alpha_ratio" in roles:
        return _product(source, "alpha_ratio", 1.0)
    if "rank" in roles and dimension.role == "alpha_ratio" and "alpha" in roles:
        return _product(source, "alpha", -1.0)
    return None


def _named(name: str) -> _Read:
    return lambda configuration: configuration.get(name)


def _product(source: Space, role: str, power: float) -> _Read:
    """alpha = ratio * rank, or ratio = alpha / rank."""
    roles = source.role_columns
    first, rank = (source.dimensions[roles[r]].name for r in (role, "rank"))

    def read(configuration: Mapping[str, Any]) -> Any:
        if configuration.get(first) is None or configuration.get(rank) is None:
            return None
        return float(configuration[first]) * float(configuration[rank]) ** power

    return read


def _coordinates(dimension: Dimension, values: Sequence[Any]) -> np.ndarray:
    if not dimension.is_ordered:
        return _of_choices(dimension, values)
    known = [math.nan if v is None or isinstance(v, str) else float(v) for v in values]
    if dimension.kind == "categorical":
        return _between_choices(dimension, np.array(known))
    # encode() wants plain numbers; NaN stays NaN.
    u = np.array([dimension.encode(v) for v in known], dtype=float)
    return np.clip(u, -_OUTSIDE, 1.0 + _OUTSIDE)


def _between_choices(dimension: Dimension, values: np.ndarray) -> np.ndarray:
    """Numbers between numeric choices, in the logarithm where all are positive."""
    levels = np.array([float(choice) for choice in dimension.levels])  # type: ignore[arg-type]
    if levels[0] > 0:
        levels, values = np.log(levels), np.log(np.where(values > 0, values, np.nan))
    index = np.arange(len(levels), dtype=float)
    position = np.interp(values, levels, index)
    position = np.where(values < levels[0] - 1e-9, -1.0, position)
    position = np.where(values > levels[-1] + 1e-9, float(len(levels)), position)
    return (np.where(np.isnan(values), np.nan, position) + 0.5) / len(levels)


def _of_choices(dimension: Dimension, values: Sequence[Any]) -> np.ndarray:
    """Choices without order; one that the target lacks gets a place outside the cube.

    Such places differ from one another and from all choices of the target, which is all that a
    kernel over unordered values looks at.
    """
    unknown = sorted({repr(v) for v in values if math.isnan(_choice(dimension, v))} - {"None"})
    u = np.full(len(values), math.nan)
    for row, value in enumerate(values):
        u[row] = _choice(dimension, value)
        if math.isnan(u[row]) and repr(value) in unknown:
            u[row] = -1.0 - unknown.index(repr(value))
    return u


def _choice(dimension: Dimension, value: Any) -> float:
    u = dimension.encode(value)
    if not math.isnan(u) or dimension.role not in ("targets", "layers"):
        return u
    if not isinstance(value, str):
        return math.nan
    gaps = [abs(coverage(str(choice)) - coverage(value)) for choice in dimension.levels]
    nearest = int(np.argmin(gaps))
    close = gaps[nearest] <= _SAME_COVERAGE
    return dimension.encode(dimension.levels[nearest]) if close else math.nan
