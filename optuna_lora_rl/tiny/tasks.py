"""The built-in fine-tuning tasks: families of data, each in two sizes, in three splits.

``<family>-small`` has 96 training examples and ``<family>-ample`` 1024; both are tuned on the
same 160 validation and judged on the same 256 test examples. No prompt stands in two splits.
What a task holds depends on its name alone (for the real-text families, also on the standard
library of the Python that runs it).
"""

from __future__ import annotations

import random
import textwrap
from functools import cache
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.tiny import exercises
from optuna_lora_rl.tiny import standard_library

if TYPE_CHECKING:
    from collections.abc import Callable

    Example = dict[str, str]

TRAINING_SIZES = {"small": 96, "ample": 1024}
VALIDATION_SIZE = 160
TEST_SIZE = 256
SPLITS = ("train", "validation", "test")

_POOL_SIZE = TEST_SIZE + VALIDATION_SIZE + max(TRAINING_SIZES.values())
_LONGEST_DECLARATION = 90
_LONGEST_SUMMARY = 80
_LONGEST_EXCERPT = 240


def load(task: str, split: str) -> list[Example]:
    """Return one split of a task.

    Args:
        task: ``<family>-small`` or ``<family>-ample``; ``TASKS`` has them all.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        Rows with the keys ``prompt`` and ``completion``, or ``text`` for the family ``sources``.

    Raises:
        UserError: There is no such task or split.
    """
    if task not in TASKS:
        raise UserError(f"There is no built-in task {task!r}; there are: {', '.join(TASKS)}.")
    if split not in SPLITS:
        raise UserError(f"Split {split!r} of task {task!r} is not one of {', '.join(SPLITS)}.")
    family, size = task.rsplit("-", 1)
    pool = _pool(family)
    tuning_start = TEST_SIZE + VALIDATION_SIZE
    bounds = {
        "test": (0, TEST_SIZE),
        "validation": (TEST_SIZE, tuning_start),
        "train": (tuning_start, tuning_start + TRAINING_SIZES[size]),
    }
    return [dict(example) for example in pool[slice(*bounds[split])]]


@cache
def _pool(family: str) -> tuple[Example, ...]:
    """Return the distinct examples of a family in the order that the splits are cut from."""
    generator = random.Random(f"optuna_lora_rl {family}")
    if family in exercises.FAMILIES:
        return _compose(exercises.FAMILIES[family], generator)
    pool = _REAL_TEXT[family]()
    generator.shuffle(pool)
    return tuple(pool[:_POOL_SIZE])


def _compose(
    exercise: Callable[[random.Random], tuple[str, str]], generator: random.Random
) -> tuple[Example, ...]:
    answers: dict[str, str] = {}
    while len(answers) < _POOL_SIZE:
        question, answer = exercise(generator)
        answers[f"{question}\nAnswer:"] = f" {answer}"
    return tuple({"prompt": prompt, "completion": answers[prompt]} for prompt in answers)


def _docstrings() -> list[Example]:
    """Return declarations of functions and classes, each with its docstring's first line."""
    summaries: dict[str, str] = {}
    for relative in standard_library.reserved_files():
        for declaration, docstring in standard_library.documented(relative):
            summary = docstring.strip().splitlines()[0].strip()
            if len(summary) > 8:
                shown = textwrap.shorten(declaration, _LONGEST_DECLARATION, placeholder=" ...")
                summaries.setdefault(shown, summary[:_LONGEST_SUMMARY])
    return [
        {"prompt": f"{declaration}\nSummary:", "completion": f" {summary}"}
        for declaration, summary in summaries.items()
    ]


def _sources() -> list[Example]:
    """Return excerpts of source code of some whole lines each, without their indentation."""
    excerpts: dict[str, None] = {}
    for relative in standard_library.reserved_files():
        lines: list[str] = []
        for line in standard_library.read(relative).splitlines():
            if sum(map(len, lines)) + len(line) > _LONGEST_EXCERPT and len(lines) > 2:
                excerpts.setdefault(textwrap.dedent("\n".join(lines)).strip("\n"))
                lines = []
            if line.strip():
                lines.append(line[:_LONGEST_EXCERPT])
    return [{"text": text} for text in excerpts]


_REAL_TEXT: dict[str, Callable[[], list[Example]]] = {
    "docstrings": _docstrings,
    "sources": _sources,
}

FAMILIES = (*exercises.FAMILIES, *_REAL_TEXT)
TASKS = tuple(f"{family}-{size}" for family in FAMILIES for size in TRAINING_SIZES)
