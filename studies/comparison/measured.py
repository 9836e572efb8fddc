"""Measured LoRA tables as problems, in several guises.

A guise says which parameters are tuned, how the learning rates are scaled, and what cost is worth.
The built-in models are small, so that their best learning rates are tens of times the guides'; a
scaled problem has the same surface at another place of the learning rate, as a larger model would.

- ``usual``: learning rates a tenth of the measured ones, so that the best are near the guides';
- ``high``: as measured;
- ``low``: a hundredth, so that the best are far below the guides';
- ``few``: learning rate and rank alone, ``wide``: all nine parameters, ``costly``: with three
  times the weight on cost, so that small adapters win; each table at one of the three scales.

The noise is that of the table's repeated runs; runs that diverge fail.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from optuna_lora_rl.learning import tables
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.learning.tables.problem import TableProblem
from studies.comparison.problem import LORA
from studies.comparison.problem import Problem

_MAIN = (
    "learning_rate",
    "lora_rank",
    "alpha_ratio",
    "lora_dropout",
    "target_modules",
    "batch_size",
)
_SCALES = (0.1, 1.0, 0.01)
GUISES: dict[str, dict[str, Any]] = {
    "usual": {"tuned": _MAIN, "scale": 0.1},
    "high": {"tuned": _MAIN, "scale": 1.0},
    "low": {"tuned": _MAIN, "scale": 0.01},
    "few": {"tuned": ("learning_rate", "lora_rank")},
    "wide": {},
    "costly": {"tuned": _MAIN, "cost_weight": 0.3},
}


@cache
def _surfaces() -> surfaces.Surfaces:
    return surfaces.load()


def measured_tasks(split: str) -> tuple[str, ...]:
    """Names of the tables of a split that have been measured."""
    if not dataset.FILE.exists():
        return ()
    known = set(_surfaces().names)
    return tuple(n for n, task in tables.TASKS.items() if task.split == split and n in known)


def table_problem(task: str, guise: str, known: surfaces.Surfaces | None = None) -> Problem:
    """A table in one of ``GUISES``, by its surface; by default the shipped one."""
    said = dict(GUISES[guise])
    turn = list(tables.TASKS).index(task) + list(GUISES).index(guise)
    scale = said.pop("scale", _SCALES[turn % len(_SCALES)])
    said["shift"] = {"learning_rate": scale}
    known = known or _surfaces()
    truth = TableProblem(task, failures=True, shipped=known, **said)
    noise = float(known.noise[known.names.index(task)])

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        score = truth.evaluate(params)
        scatter = rng.normal()
        if math.isnan(score):
            raise FloatingPointError
        return score + noise * scatter, max(0.0, truth.regret(score))

    name = f"{task.replace('/', '-')}-{guise}"
    group = f"measured tables: {guise}"
    return Problem(name, group, LORA, truth.search_space, evaluate, surface=task)


def table_problems(split: str, guises: list[str]) -> list[Problem]:
    """Every measured table of a split in every guise."""
    return [table_problem(task, guise) for guise in guises for task in measured_tasks(split)]
