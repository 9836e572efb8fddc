"""From a configuration to the coordinates that the surfaces work in.

Notations
    D    coordinates, one for each name of ``design.SPACE``, in its order (9)
    X    coordinates of configurations, shape (n, D)

An ordered parameter stands at ``(g(value) - g(low)) / (g(high) - g(low))`` with the bounds of
``design.SPACE`` and ``g`` the logarithm for the names in ``LOGARITHMIC``, else the identity: 0
and 1 are the ends of what was measured. ``target_modules`` and ``layers`` have no order and stand
at the number of their value in ``design.SPACE``; the kernel only asks whether two are equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

NAMES = tuple(design.SPACE)
LOGARITHMIC = frozenset({"lora_rank", "alpha_ratio", "learning_rate", "batch_size", "max_steps"})
_COLUMN = {name: column for column, name in enumerate(NAMES)}
# Linear modules by target, and the part of the layers, each in the order of ``design.SPACE``.
_MODULES = torch.tensor([2.0, 4.0, 3.0, 7.0], dtype=torch.float64)
_LAYERS = torch.tensor([1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
UNORDERED = np.array([name in ("target_modules", "layers") for name in NAMES])


def bounds(name: str) -> tuple[float, float]:
    """Return the smallest and largest measured value of an ordered parameter."""
    one = design.SPACE[name]
    if isinstance(one, design.Span):
        return one.low, one.high
    return float(one.values[0]), float(one.values[-1])


def coordinate(name: str, value: Any) -> float:
    """Return the coordinate of one value.

    Raises:
        UserError: It is no value of the parameter, or lies outside what was measured.
    """
    one = design.SPACE[name]
    if name in ("target_modules", "layers") and isinstance(one, design.Level):
        if value not in one.values:
            known = ", ".join(map(str, one.values))
            raise UserError(f"{name} is {value!r}, but the tables hold {known}.")
        return float(one.values.index(value))
    low, high = bounds(name)
    if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
        raise UserError(f"{name} is {value:g}, but the tables hold {low:g} to {high:g}.")
    if name in LOGARITHMIC:
        return math.log(value / low) / math.log(high / low)
    return (float(value) - low) / (high - low)


def point(configuration: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the coordinates of one configuration that names every parameter, shape (D,)."""
    return np.array([coordinate(name, configuration[name]) for name in NAMES])


def matrix(parameters: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return the coordinates of a table's columns, shape (n, D)."""
    columns = [[coordinate(name, value) for value in parameters[name]] for name in NAMES]
    return np.array(columns, dtype=np.float64).T


def turned(x: Tensor) -> Tensor:
    """Return coordinates (..., D) as the kernels see them: the alpha ratio's turned to the update.

    Adam moves every weight by about the learning rate, so that the update grows as learning rate
    times alpha ratio times the root of the number of directions, rank times modules; good
    configurations lie along a ridge of it. Its logarithm, in units of the learning rate's range,
    takes the place of the alpha ratio's coordinate.
    """

    def way(name: str) -> Tensor:
        low, high = bounds(name)
        return x[..., _COLUMN[name]] * math.log(high / low)

    modules = _MODULES.to(x)[x[..., _COLUMN["target_modules"]].long()]
    modules = modules * _LAYERS.to(x)[x[..., _COLUMN["layers"]].long()]
    update = way("learning_rate") + way("alpha_ratio") + 0.5 * (way("lora_rank") + modules.log())
    low, high = bounds("learning_rate")
    seen = x.clone()
    seen[..., _COLUMN["alpha_ratio"]] = update / math.log(high / low)
    return seen
