"""Measured LoRA tables as problems, in several guises.

A guise says which parameters are tuned, over which ranges, and what cost is worth:

- ``usual``: a guide's space, ranges round a guide's values moved to the tables' scale;
- ``shifted``: the same surface for a model whose learning rates are a tenth to a hundredth;
- ``wide``: all nine parameters over all that was measured, at no cost of size;
- ``few``: learning rate and rank alone;
- ``costly``: as ``usual``, with three times the weight on cost, so that small adapters win.

The noise is that of the table's repeated runs; runs that diverge fail.
"""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import Any

import numpy as np

from optuna_lora_rl.learning import tables
from optuna_lora_rl.learning.comparison.problem import LORA
from optuna_lora_rl.learning.comparison.problem import Problem
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.learning.tables.problem import TableProblem

_MAIN = ("learning_rate", "lora_rank", "alpha_ratio", "lora_dropout", "target_modules")
GUISES: dict[str, dict[str, Any]] = {
    "usual": {"tuned": (*_MAIN, "batch_size")},
    "shifted": {"tuned": (*_MAIN, "batch_size")},
    "wide": {"cost_weight": 0.0},
    "few": {"tuned": ("learning_rate", "lora_rank")},
    "costly": {"tuned": (*_MAIN, "batch_size"), "cost_weight": 0.3},
}
# Factors on the learning rate of a shifted task, by turns.
_SHIFTS = (0.1, 0.03, 0.01)


@cache
def _surfaces() -> surfaces.Surfaces:
    return surfaces.load()


def measured_tasks(split: str) -> tuple[str, ...]:
    """Names of the tables of a split that have been measured."""
    known = set(_surfaces().names)
    return tuple(n for n, task in tables.TASKS.items() if task.split == split and n in known)


def table_problem(task: str, guise: str) -> Problem:
    """A table in one of ``GUISES``."""
    said = dict(GUISES[guise])
    if guise == "shifted":
        turn = zlib.crc32(task.encode()) % len(_SHIFTS)
        said["shift"] = {"learning_rate": _SHIFTS[turn]}
    known = _surfaces()
    truth = TableProblem(task, failures=True, shipped=known, **said)
    noise = float(known.noise[known.names.index(task)])

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        score = truth.evaluate(params)
        scatter = rng.normal()
        if math.isnan(score):
            raise FloatingPointError
        return score + noise * scatter, max(0.0, truth.regret(score))

    name = f"{task.replace('/', '-')}-{guise}"
    return Problem(name, f"measured tables: {guise}", LORA, truth.search_space, evaluate)


def table_problems(split: str, guises: list[str]) -> list[Problem]:
    """Every measured table of a split in every guise."""
    return [table_problem(task, guise) for guise in guises for task in measured_tasks(split)]
