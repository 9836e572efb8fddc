"""What a training task's policy is told of model, data and run: right, partly, wrongly, nothing.

A task has its best learning rate already. A model is drawn for which the measured relations
(:mod:`optuna_lora_rl.policy.scaling`) expect about that rate, as far off as they are in life; or,
where the context misleads, any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from optuna_lora_rl.policy.context import METHODS
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.scaling import SPREAD
from optuna_lora_rl.policy.scaling import expected_rate

# Shares of tasks that are told nothing, and of the others those that are misled.
_NOTHING, _MISLED = 0.35, 0.12
_WIDTHS = np.unique(np.round(2.0 ** np.linspace(5.5, 14.0, 35) / 8) * 8).astype(int)
# Farthest that the expected rate may lie from the wished one, in decades.
_FAR = 0.25


def draw_context(
    rng: np.random.Generator,
    space: Space,
    peak: float,
    *,
    small: bool,
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> TuningContext | None:
    """What the policy is told; ``None`` for nothing.

    Args:
        rng: of all random numbers.
        space: of the task.
        peak: log10 of the best learning rate; NaN where there is none.
        small: whether the task's data are few.
        measured: what is truly known of a measured task.
    """
    if rng.random() < _NOTHING:
        return None
    run = _run(rng, space, small=small)
    run |= {name: measured[name] for name in run if name in measured}
    misled = math.isnan(peak) or rng.random() < _MISLED
    # Most of the relations' error, and now and then far more.
    error = SPREAD * (rng.normal() if rng.random() < 0.85 else 3.0 * rng.normal())
    told: dict[str, Any] = {"hidden_size": int(rng.choice(_WIDTHS))}
    if not misled and "hidden_size" in measured:
        told = {"hidden_size": measured["hidden_size"]}
    elif not misled:
        width = _width_for(space, run, peak - error)
        told = {} if width is None else {"hidden_size": width}
    if told and rng.random() < 0.15:  # the parameters are known instead
        told = {"parameters": round(12.0 / 128.0 * told["hidden_size"] ** 3)}
    return TuningContext(**run, **told)


def _run(rng: np.random.Generator, space: Space, *, small: bool) -> dict[str, Any]:
    """Data, steps, batch size and method, each of them mostly known."""
    middle = 2.2 if small else 4.0
    known: dict[str, Any] = {
        "examples": int(10.0 ** np.clip(rng.normal(middle, 0.6), 1.2, 6.5)),
        "steps": int(10.0 ** rng.uniform(1.0, 3.3)),
        "batch_size": int(2 ** rng.integers(1, 8)),
        "method": str(rng.choice(METHODS, p=(0.8, 0.1, 0.03, 0.07))),
    }
    known = {name: value for name, value in known.items() if rng.random() < 0.7}
    for role in ("steps", "batch_size"):
        if role in space.role_columns:
            known.pop(role, None)
    return known


def _width_for(space: Space, run: dict[str, Any], rate: float) -> int | None:
    """A width for which about that rate is expected; ``None`` where there is none."""
    contexts = [TuningContext(**run, hidden_size=int(width)) for width in _WIDTHS]
    # How many rows a run sees does not depend on the width.
    rows = space_prior(space, contexts[0]).rows
    expected = [expected_rate(context, rows) for context in contexts]
    off = [abs(one.mean - rate) if one else math.inf for one in expected]
    best = int(np.argmin(off))
    return int(_WIDTHS[best]) if off[best] < _FAR else None
