"""What a person would try first, before a sampler takes over.

- ``defaults``: one trial with what guides to LoRA say, moved into the range where it lies outside;
  the middle of every range where the space is not a LoRA one.
- ``sweep``: an expert's five learning rates at the middle rank, alpha twice the rank, all targets,
  no dropout: quantiles .5, .25 and .75 of the range, then two steps by what these said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import coverage
from optuna_lora_rl.samplers.history import space_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SWEEP = 5
# Guides' values by role; alpha is twice the rank, targets and layers as many as there are.
_GUIDE = {
    "learning_rate": 2e-4,
    "rank": 16.0,
    "alpha_ratio": 2.0,
    "dropout": 0.0,
    "batch_size": 16.0,
    "weight_decay": 0.0,
}


def defaults(distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The guides' configuration."""
    return _configuration(space_of(distributions), _GUIDE)


def sweep(
    distributions: Mapping[str, BaseDistribution], scores: Sequence[float | None]
) -> dict[str, Any] | None:
    """The next configuration of the sweep.

    Args:
        distributions: the search space.
        scores: what the earlier ones scored, larger is better; None for a failed run.

    Returns:
        None at the end of the sweep. Without a learning rate it has one configuration.
    """
    space = space_of(distributions)
    if len(scores) >= (SWEEP if "learning_rate" in space.role_columns else 1):
        return None
    guide = {k: v for k, v in _GUIDE.items() if k not in ("learning_rate", "rank")}
    params = _configuration(space, guide)
    if "learning_rate" in space.role_columns:
        dimension = space.dimensions[space.role_columns["learning_rate"]]
        params[dimension.name] = dimension.decode(_place(scores))
    return params


def _place(scores: Sequence[float | None]) -> float:
    """The next quantile of the learning rate's range."""
    known: dict[float, float] = {}
    for score in scores:
        known[_quantile(known)] = -math.inf if score is None else score
    return _quantile(known)


def _quantile(known: Mapping[float, float]) -> float:
    if len(known) < 3:
        return (0.5, 0.25, 0.75)[len(known)]
    best = max(known, key=lambda place: known[place])
    if len(known) == 3 and best != 0.5:
        return 0.1 if best < 0.5 else 0.9
    # Halfway to the better of the neighbours.
    below = max((place for place in known if place < best), default=None)
    above = min((place for place in known if place > best), default=None)
    beside = [place for place in (below, above) if place is not None]
    return 0.5 * (best + max(beside, key=lambda place: known[place]))


def _configuration(space: Space, guide: Mapping[str, float]) -> dict[str, Any]:
    """What is known by role, else the middle."""
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
