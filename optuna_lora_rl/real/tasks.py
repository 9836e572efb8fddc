"""The tasks by name, and how their examples are divided into splits."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import islice
from typing import Any
from typing import NamedTuple

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.real import extraction
from optuna_lora_rl.real import inflection
from optuna_lora_rl.real import languages
from optuna_lora_rl.real.exercise import Exercise

SIZES = {"test": 256, "validation": 128, "train": 1024}
REAL, REASONING = "real:", "reasoning_gym:"
PREFIXES = (REAL, REASONING)
INSTALL = "pip install 'optuna_lora_rl[real]'"

# How often in a row a generator may repeat itself before it counts as exhausted.
_PATIENCE = 2000


class _Task(NamedTuple):
    package: str
    exercises: Callable[[random.Random], Iterator[Exercise]]


_TASKS = {
    "real:extraction": _Task("faker", extraction.exercises),
    "real:dates": _Task("babel", languages.dates),
    "real:numbers": _Task("babel", languages.numbers),
    "real:inflection": _Task("lemminflect", inflection.exercises),
}
TASKS = tuple(_TASKS)

Row = dict[str, list[dict[str, str]]]


def load(task: str, split: str) -> list[Row]:
    """Returns one split of a task.

    Args:
        task: One of ``TASKS``, or ``reasoning_gym:<generator>``.
        split: ``train`` (1,024 examples), ``validation`` (128) or ``test`` (256); a generator with
            fewer different questions has fewer training examples.

    Raises:
        UserError: There is no such task or split, or its package is not installed.
    """
    if split not in SIZES:
        raise UserError(f"split {split!r} of {task!r} is not one of {', '.join(SIZES)}")
    start = 0
    for name, size in SIZES.items():
        if name == split:
            return [_row(exercise) for exercise in _pool(task)[start : start + size]]
        start += size
    raise AssertionError(split)


def _row(exercise: Exercise) -> Row:
    return {
        "prompt": [{"role": "user", "content": exercise.question}],
        "completion": [{"role": "assistant", "content": exercise.answer}],
    }


@cache
def _pool(task: str) -> tuple[Exercise, ...]:
    """Exercises that ask for different things, in the order that the splits are cut from."""
    rng = random.Random(f"optuna_lora_rl {task}")
    if task.startswith(REASONING):
        drawn = _reasoning(task.removeprefix(REASONING))
    elif task in _TASKS:
        _demand(task, _TASKS[task].package)
        drawn = _TASKS[task].exercises(rng)
    else:
        raise UserError(
            f"there is no task {task!r}; there are {', '.join(TASKS)} and {REASONING}<generator>"
        )
    pool = tuple(islice(_different(drawn), sum(SIZES.values())))
    needed = SIZES["test"] + SIZES["validation"]
    if len(pool) <= needed:
        raise UserError(
            f"{task!r} asks only {len(pool)} different questions; more than {needed} are needed "
            "to set validation and test examples aside"
        )
    return pool


def _different(exercises: Iterator[Exercise]) -> Iterator[Exercise]:
    subjects: set[str] = set()
    repeats = 0
    for exercise in exercises:
        repeats += 1
        if exercise.subject not in subjects:
            subjects.add(exercise.subject)
            repeats = 0
            yield exercise
        elif repeats > _PATIENCE:
            return


def _reasoning(generator: str) -> Iterator[Exercise]:
    _demand(REASONING + generator, "reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        raise UserError(
            f"reasoning_gym has no generator {generator!r}; some are "
            f"{', '.join(sorted(DATASETS)[:8])}"
        )
    size = sum(SIZES.values())
    for seed in range(4):
        entries: Any = reasoning_gym.create_dataset(generator, size=size, seed=seed)
        for entry in entries:
            question, answer = str(entry["question"]), str(entry["answer"])
            yield Exercise(subject=question, question=question, answer=answer)


def _demand(task: str, package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{task!r} needs the package {package}, which is not there; {INSTALL}")
