"""Tables with scale in them: what is measured on which model, over which configurations.

A *task* is a base model, a data set cut to some examples, and the numbers of steps and rows a
batch that its runs have. Models are 48 to 576 wide and 2 to 30 layers deep, runs 8 to 512 steps
long, on 16 to 4,000 examples: the axes along which the best learning rate, rank, targets and
dropout are expected to move. Each task has its own scrambled Sobol sequence of configurations, so
that the first ``n`` of any are a quasi-random design, and those of several tasks complete each
other.

What is kept out of training: two whole widths (``HELD_MODELS``), a whole length of runs
(``HELD_STEPS``), the families that the other tables keep out, and two of the real tasks.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.design import Level
from optuna_lora_rl.learning.tables.design import Span

if TYPE_CHECKING:
    from optuna_lora_rl.vocabulary import Value

REAL_MODEL = "smollm2"
HELD_MODELS = ("96x8", "384x4")
HELD_STEPS = (128, 192)
PRETRAINED = ("48x2", "256x2", "96x8", "512x3", "384x4")
"""Models that are not in the package: ``studies.tiny.pretraining`` makes them."""
LOG = "scale.jsonl"
HELD_REAL = ("real:numbers", "real:inflection")
CONFIGURATIONS = 96
_REPEATED, _REPEATED_AFTER = 6, 32
_FEW_EXAMPLES = 64
_REAL_TEXT = ("docstrings", "sources")

SHORT, MIDDLE, LONG = (8, 16), (32, 64), (256, 512)
_MODELS = ("48x2", "tiny-narrow", "tiny", "tiny-wide", "256x2", "512x3")
_WIDE = ("384x4", "512x3")
_EXERCISES = tuple(name for name in design.SPLITS["train"] if name not in _REAL_TEXT)


@dataclass(frozen=True)
class Tilted:
    """A learning rate between two bounds, in the logarithm, most of them in the middle.

    Attributes:
        bounds: Four rates. A fifth of the values lies between the first two, three fifths
            between the second and third, a fifth between the last two.
    """

    bounds: tuple[float, float, float, float]

    def at(self, share: float) -> float:
        places = (0.0, 0.2, 0.8, 1.0)
        part = 0 if share < places[1] else 1 if share < places[2] else 2
        way = (share - places[part]) / (places[part + 1] - places[part])
        low, high = self.bounds[part : part + 2]
        return float(f"{low * (high / low) ** way:.5g}")


@dataclass(frozen=True)
class Task:
    """One table.

    Attributes:
        model: Name of the base model: a built-in one, ``smollm2``, or one of ``studies.tiny``.
        data: ``tiny:<family>`` or ``real:<task>``.
        examples: Training examples.
        steps: Numbers of steps that runs have.
        batches: Numbers of rows a batch.
    """

    model: str
    data: str
    examples: int
    steps: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def family(self) -> str:
        return self.data.partition(":")[2]

    @property
    def name(self) -> str:
        steps = "-".join(map(str, self.steps))
        return f"{self.model}/{self.family}/{self.examples} examples/{steps} steps"

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``test``."""
        if self.model == REAL_MODEL:
            return "test" if self.data in HELD_REAL else "train"
        if self.model in HELD_MODELS or self.steps == HELD_STEPS:
            return "test"
        return next(split for split, names in design.SPLITS.items() if self.family in names)

    @property
    def space(self) -> dict[str, Level | Span | Tilted]:
        """The parameters that its configurations vary."""
        return {
            "learning_rate": Tilted((1e-5, 5e-4, 5e-2, 3e-1)),
            "lora_rank": Level((1, 2, 4, 8, 16, 32, 64)),
            "alpha_ratio": Span(0.25, 8.0, log=True),
            "target_modules": Level(("qv", "attention", "mlp", "all-linear")),
            "batch_size": Level(self.batches),
            "max_steps": Level(self.steps),
            # Dropout is expected to pay with few examples only.
            "lora_dropout": Span(0.0, 0.3 if self.examples <= _FEW_EXAMPLES else 0.0),
        }

    def configurations(self) -> list[dict[str, Value]]:
        """Return all configurations, in the order in which they are measured."""
        from scipy.stats import qmc

        space, seed = self.space, zlib.crc32(self.name.encode())
        power = math.ceil(math.log2(CONFIGURATIONS))
        points = qmc.Sobol(len(space), scramble=True, seed=seed).random_base2(power)
        return [
            {name: one.at(share) for (name, one), share in zip(space.items(), row, strict=True)}
            for row in points[:CONFIGURATIONS].tolist()
        ]


def runs() -> list[tuple[int, int]]:
    """Return (configuration, seed) of a task's runs, in the order in which they are measured.

    The first few configurations have a second seed, for the noise, once the surface is there.
    """
    first = [(number, 0) for number in range(_REPEATED_AFTER)]
    again = [(number, 1) for number in range(_REPEATED)]
    return first + again + [(number, 0) for number in range(_REPEATED_AFTER, CONFIGURATIONS)]


def _tiny(model: str, turn: int) -> list[Task]:
    """The tables of one small model; ``turn`` makes the families differ from model to model."""

    def exercise(place: int) -> str:
        return f"tiny:{_EXERCISES[(2 * turn + place) % len(_EXERCISES)]}"

    def other(names: tuple[str, ...]) -> str:
        return f"tiny:{names[turn % len(names)]}"

    batches = (2, 4, 8, 16) if model in _WIDE else (2, 4, 8, 16, 32)
    tasks = [
        Task(model, exercise(0), 64, SHORT, batches),
        Task(model, exercise(1), 1024, MIDDLE, batches),
        Task(model, exercise(2), 16, MIDDLE, batches),
        Task(model, other(_REAL_TEXT), 1024, MIDDLE, batches),
    ]
    if model not in HELD_MODELS:
        tasks += [
            Task(model, other(design.SPLITS["validation"]), 256, MIDDLE, batches),
            Task(model, other(("cipher", "plurals")), 256, MIDDLE, batches),
            Task(model, exercise(3), 64, HELD_STEPS, batches[:3]),
        ]
    if model in ("tiny-narrow", "tiny-wide", "256x2", "96x8"):
        tasks.append(Task(model, exercise(4), 4000, LONG, batches[:3]))
    if model in ("48x2", "tiny", "256x2"):
        tasks.append(Task(model, exercise(5), 64, LONG, batches[:3]))
    return tasks


def _real() -> list[Task]:
    """Half of all combinations, so that no two of data, examples and steps go together."""
    few, many, brief, longer = 64, 512, 24, 96
    drawn = {
        "real:dates": ((many, brief), (few, longer)),
        "real:numbers": ((few, brief), (many, longer)),
        "real:extraction": ((few, brief), (many, longer)),
        "real:inflection": ((many, brief), (few, longer)),
    }
    return [
        Task(REAL_MODEL, data, pairs[turn][0], (pairs[turn][1],), batches)
        for turn, batches in enumerate(((2, 4, 8), (2, 4)))
        for data, pairs in drawn.items()
    ]


_ALL = (
    *_real(),
    *(task for turn, model in enumerate(_MODELS) for task in _tiny(model, turn)),
    *(task for turn, model in enumerate(HELD_MODELS) for task in _tiny(model, turn + 3)),
)
# In the order in which they are begun: long runs last.
TASKS = {task.name: task for task in sorted(_ALL, key=lambda task: max(task.steps) > 64)}
