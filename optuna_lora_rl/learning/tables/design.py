"""What is measured: the tasks, the split of their families, and the configurations.

A *task* is a built-in base model and a built-in data set, named ``<model>/<family>-<size>``. All
tasks are measured at the same configurations: the first points of one scrambled Sobol sequence,
so that the first ``n`` rows of any table are themselves a quasi-random design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence

    from optuna_lora_rl.vocabulary import Value

MODELS = ("tiny", "tiny-narrow", "tiny-wide")
SIZES = ("small", "ample")
CONFIGURATIONS = 400
REPEATED = 40
"""The first so many configurations are run with a second seed as well."""

# Real text (docstrings, sources) stands in training and in test, exercises everywhere.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": (
        "arithmetic",
        "brackets",
        "dates",
        "docstrings",
        "extraction",
        "numerals",
        "reversal",
        "sorting",
    ),
    "validation": ("reviews", "units"),
    "test": ("cipher", "plurals", "sources"),
}
FAMILIES = tuple(sorted(family for families in SPLITS.values() for family in families))

_SEED = 20_26
_BLOCK, _TURN = 40, 10


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        model: Name of the built-in base model.
        family: Family of the data.
        size: ``small`` or ``ample``, the amount of training data.
    """

    model: str
    family: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.family}-{self.size}"

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``test``, by the family."""
        return next(split for split, families in SPLITS.items() if self.family in families)


def _rotated() -> tuple[Task, ...]:
    # The two sizes of a family are measured on two models, and each model about equally often.
    return tuple(
        Task(MODELS[(place + turn) % len(MODELS)], family, size)
        for turn, size in enumerate(SIZES)
        for place, family in enumerate(FAMILIES)
    )


TASKS = {task.name: task for task in _rotated()}


@dataclass(frozen=True)
class Level:
    """A parameter that takes one of a few values."""

    values: tuple[Value, ...]

    def at(self, share: float) -> Value:
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


@dataclass(frozen=True)
class Span:
    """A parameter between two bounds, even in itself or in its logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        if self.log:
            exponent = math.log(self.low) + share * math.log(self.high / self.low)
            return float(f"{math.exp(exponent):.5g}")
        return float(f"{self.low + share * (self.high - self.low):.5g}")


SPACE: dict[str, Level | Span] = {
    "lora_rank": Level((1, 2, 4, 8, 16, 32, 64)),
    "alpha_ratio": Span(0.25, 8.0, log=True),
    "learning_rate": Span(5e-5, 1e-1, log=True),
    "lora_dropout": Span(0.0, 0.3),
    "target_modules": Level(("qv", "attention", "mlp", "all-linear")),
    "layers": Level(("all", "first-half", "last-half", "middle")),
    "batch_size": Level((2, 4, 8, 16)),
    "max_steps": Level((8, 16, 32, 64)),
    "weight_decay": Span(0.0, 0.3),
}
"""The parameters of a table; ``alpha_ratio`` is ``lora_alpha / lora_rank``."""


def configurations(count: int = CONFIGURATIONS) -> list[dict[str, Value]]:
    """Return the first ``count`` configurations of the design, in the words of ``SPACE``."""
    from scipy.stats import qmc

    power = max(count - 1, 1).bit_length()
    points = qmc.Sobol(len(SPACE), scramble=True, seed=_SEED).random_base2(power)
    return [
        {name: one.at(share) for (name, one), share in zip(SPACE.items(), row, strict=True)}
        for row in points[:count].tolist()
    ]


def tuned(configuration: dict[str, Value]) -> dict[str, Value]:
    """Return a configuration in the fine-tuner's words: with ``lora_alpha`` for the ratio."""
    said = dict(configuration)
    ratio = float(said.pop("alpha_ratio"))
    return {**said, "lora_alpha": float(f"{ratio * int(said['lora_rank']):.6g}")}


def chosen(names: Sequence[str]) -> list[str]:
    """Return the named tasks, or all of them where none is named.

    Raises:
        UserError: There is no such task.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"There is no table of {name!r}; there are: {', '.join(TASKS)}.")
    return list(names) or list(TASKS)


def order(tasks: Sequence[str], count: int = CONFIGURATIONS) -> Iterator[tuple[str, int, int]]:
    """Yield (task, configuration, seed) so that the tables grow side by side.

    Blocks of 40 configurations, each over all tasks and followed by ten of the second seeds, so
    that the noise is known early.
    """
    for block, start in enumerate(range(0, count, _BLOCK)):
        for number in range(start, min(start + _BLOCK, count)):
            yield from ((task, number, 0) for task in tasks)
        last = start + _BLOCK >= count
        turn = range(_TURN * block, min(count, REPEATED) if last else _TURN * (block + 1))
        for number in (number for number in turn if number < REPEATED):
            yield from ((task, number, 1) for task in tasks)
