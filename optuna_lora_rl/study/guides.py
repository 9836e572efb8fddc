"""The configuration that guides to LoRA name, moved into a space's ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import coverage
from optuna_lora_rl.samplers.history import space_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Guides' values by role; alpha is twice the rank, targets and layers as many as there are.
VALUES = {
    "learning_rate": 2e-4,
    "rank": 16.0,
    "alpha_ratio": 2.0,
    "dropout": 0.0,
    "batch_size": 16.0,
    "weight_decay": 0.0,
}


def defaults(distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return the guides' configuration; the middle of every range outside LoRA.

    Args:
        distributions: The search space; a value outside its range is moved to the range's end.
    """
    return configuration(space_of(distributions), VALUES)


def configuration(space: Space, guide: Mapping[str, float]) -> dict[str, Any]:
    """Return a configuration with what is known by role, else the middle of each range.

    Args:
        space: The search space.
        guide: Values by role.
    """
    known = space.is_lora
    params: dict[str, Any] = {}
    # Alpha goes by the rank.
    for dimension in sorted(space.dimensions, key=lambda d: d.role == "alpha"):
        role = dimension.role if known else None
        value = guide.get(role) if role else None
        rank = space.role_columns.get("rank")
        if role == "alpha":
            value = 32.0 if rank is None else 2.0 * params[space.dimensions[rank].name]
        if role in ("targets", "layers"):
            params[dimension.name] = max(dimension.choices, key=lambda c: coverage(str(c)))
        elif value is not None:
            params[dimension.name] = _nearest(dimension, value)
        else:
            params[dimension.name] = _middle(dimension)
    return params


def _middle(dimension: Dimension) -> Any:
    if dimension.kind == "categorical":
        levels = dimension.levels
        return levels[(len(levels) - 1) // 2] if dimension.is_ordered else levels[0]
    low, high = dimension.low, dimension.high
    middle = math.sqrt(low * high) if dimension.log else 0.5 * (low + high)
    return dimension.decode(dimension.encode(middle))


def _nearest(dimension: Dimension, value: float) -> Any:
    """The value of a dimension that is nearest to a wished one."""
    if dimension.kind == "categorical":
        return min(dimension.choices, key=lambda c: abs(float(c) - value))  # type: ignore[arg-type]
    return dimension.decode(dimension.encode(min(max(value, dimension.low), dimension.high)))
