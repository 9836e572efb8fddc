"""What a person would try first, before a sampler takes over.

- ``defaults``: one trial with what guides to LoRA say (``optuna_lora_rl.study.guides``).
- ``sweep``: an expert's five learning rates at the middle rank, alpha twice the rank, all targets,
  no dropout: quantiles .5, .25 and .75 of the range, then two steps by what these said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.study import guides

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SWEEP = 5


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
    guide = {k: v for k, v in guides.VALUES.items() if k not in ("learning_rate", "rank")}
    params = guides.configuration(space, guide)
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
