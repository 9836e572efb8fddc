"""Count what the runs of a table cost, for ``optuna_lora_rl.learning.tables.costs``."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.learning.tables import design

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_RANKS, _STEPS = (1, 64), (8, 64)


def count(estimate: Callable[[dict[str, Any]], float]) -> Tensor:
    """Return the coefficients of one table, shape (4, 4, 4, 2, 4).

    Args:
        estimate: The cost of one configuration in the fine-tuner's words.
    """
    levels = [_values(name) for name in ("target_modules", "layers", "batch_size")]
    corners = [[1.0, r, S, S * r] for r in _RANKS for S in _STEPS]
    made = []
    for targets, layers, batch, dropout in itertools.product(*levels, (0.0, 0.1)):
        costs = [
            estimate(
                {
                    "lora_rank": r,
                    "max_steps": S,
                    "target_modules": targets,
                    "layers": layers,
                    "batch_size": batch,
                    "lora_dropout": dropout,
                }
            )
            for r in _RANKS
            for S in _STEPS
        ]
        made.append(np.linalg.solve(np.array(corners), np.array(costs)))
    return torch.tensor(np.array(made)).reshape(*map(len, levels), 2, 4)


def _values(name: str) -> tuple[Any, ...]:
    one = design.SPACE[name]
    assert isinstance(one, design.Level)
    return one.values


def counted(task: str) -> Tensor:
    """Return the coefficients of a table by asking its fine-tuner."""
    from studies.tables.measuring import tuner

    own = tuner(design.TASKS[task])
    return count(lambda configuration: own.estimate(configuration)[1]["total"])


def write(path: Path, made: Mapping[str, Tensor]) -> None:
    """Write the coefficients of tables, by name of the task."""
    from safetensors.torch import save_file

    save_file({name: c.float().contiguous() for name, c in made.items()}, path)
