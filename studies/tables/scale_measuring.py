"""Measure the tables with scale in them, a few configurations of each at a time.

Which table is next follows from what was measured: of the small models' tables and the real
model's, those whose seconds lag behind their share; of these the one with the fewest runs, where
a run counts for more the longer it takes. So the tables grow side by side, and an unfinished
measurement is a design of fewer configurations.
"""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING
from typing import Any

import torch

from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import ScaledRecord
from optuna_lora_rl.learning.tables.records import append
from optuna_lora_rl.learning.tables.records import merged
from optuna_lora_rl.learning.tables.records import read
from studies.tables import measuring
from studies.tables import scale

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Iterable
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.vocabulary import Value

BLOCK, REAL_BLOCK = 4, 2
"""Configurations of one table that are run in a row; of the real model fewer, which take long."""
REAL_SHARE = 1 / 3
"""Share of the time that the real model's tables get."""
VALIDATION_EXAMPLES, REAL_VALIDATION_EXAMPLES = 64, 32
_MAX_LENGTH = {"sources": 40}
# From this width on two threads pay, on a machine with so little else to do.
_WIDE, _QUIET = 256, 1.7


def _rows(task: scale.Task, folder: Path) -> dict[str, str]:
    """Return the data options of a task; its rows are written where a built-in one has too few.

    None of the written rows is in the built-in task's validation or test split.
    """
    family = task.family
    if task.examples <= 1024:
        size = f"{task.data}-ample" if task.data.startswith("tiny:") else task.data
        return {"train": size}
    kept = {row["prompt"] for split in ("validation", "test") for row in _split(family, split)}
    rows = _more(family, task.examples, kept)
    paths = {}
    for split, written in (("train", rows), ("validation", _split(family, "validation"))):
        path = folder / f"{family}-{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
        paths[split] = str(path)
    return paths


def _split(family: str, split: str) -> list[dict[str, str]]:
    from optuna_lora_rl import tiny

    return tiny.load(f"{family}-ample", split)


def _more(family: str, count: int, kept: set[str]) -> list[dict[str, str]]:
    from optuna_lora_rl.tiny import exercises

    generator = random.Random(f"studies.tables {family}")
    rows: dict[str, str] = {}
    while len(rows) < count:
        question, answer = exercises.FAMILIES[family](generator)
        prompt = f"{question}\nAnswer:"
        if prompt not in kept:
            rows[prompt] = f" {answer}"
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows.items()]


def tuner(task: scale.Task, models: Path, folder: Path) -> FineTuner:
    """Return the fine-tuner of one task: on the processor, four evaluations a run.

    Args:
        task: The task.
        models: Folder of the models that ``studies.tiny.pretraining`` made.
        folder: For what is made once.
    """
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions

    own = models / task.model
    is_real = task.model == scale.REAL_MODEL
    validated = REAL_VALIDATION_EXAMPLES if is_real else VALIDATION_EXAMPLES
    return FineTuner(
        ModelOptions(name=str(own) if own.is_dir() else task.model),
        DataOptions(
            **_rows(task, folder / "rows"),
            max_train_samples=task.examples,
            max_validation_samples=validated,
            max_length=512 if is_real else _MAX_LENGTH.get(task.family, 64),
        ),
        TrainingOptions(
            evaluations=4,
            first_evaluation=0.25,
            eval_batch_size=validated,
            use_cpu=True,
            monitor=0,
        ),
        ObjectiveOptions(reference={"max_steps": max(task.steps)}),
        cache=folder / "cache",
    )


def context(own: FineTuner) -> dict[str, Any]:
    """Return what is known of a task before any run."""
    traits = own.traits()
    return {
        "hidden_size": traits["hidden_size"],
        "model_layers": traits["model_layers"],
        "model_parameters": traits["model_parameters"],
        "examples": traits["train_examples"],
        "mean_tokens": round(traits["mean_tokens"], 2),
        "method": "sft",
        "precision": own.precision,
    }


def untuned(task: scale.Task, own: FineTuner) -> ScaledRecord:
    """Return the record of the model before any fine-tuning."""
    record = measuring.untuned(task.name, own)
    return ScaledRecord(**{**vars(record), "split": task.split, "context": context(own)})


def run(
    task: scale.Task, number: int, seed: int, configuration: dict[str, Value], own: FineTuner
) -> ScaledRecord:
    """Fine-tune once and return the record; a run that fails keeps the curve that it has."""
    # Seconds of the processor: others may be at work beside.
    record = measuring.run(task.name, number, seed, configuration, own, clock=time.process_time)
    known = context(own)
    rows = min(int(configuration["batch_size"]), known["examples"])
    tokens = round(int(configuration["max_steps"]) * rows * known["mean_tokens"])
    own_fields = {"split": task.split, "context": known, "tokens": tokens}
    return ScaledRecord(**{**vars(record), **own_fields})


def ready(models: Path) -> list[scale.Task]:
    """Return the tasks whose model is there: built-in, installed, or pretrained by its recipe."""
    from studies.tiny.pretraining import RECIPES

    made = [name for name in RECIPES if (models / name / "README.md").exists()]
    builtin = ("tiny", "tiny-narrow", "tiny-wide", scale.REAL_MODEL)
    return [task for task in scale.TASKS.values() if task.model in (*made, *builtin)]


def following(records: Iterable[ScaledRecord], tasks: Sequence[scale.Task]) -> scale.Task | None:
    """Return the task whose turn it is, None when all are measured."""
    counts = dict.fromkeys((task.name for task in tasks), 0)
    seconds = dict.fromkeys(counts, 0.0)
    spent = {True: 0.0, False: 0.0}
    for record in records:
        if record.task in counts and record.configuration != UNTUNED:
            counts[record.task] += 1
            seconds[record.task] += record.seconds
            spent[record.task.startswith(scale.REAL_MODEL)] += record.seconds
    whole = len(scale.runs())
    left = [task for task in tasks if counts[task.name] < whole]
    share = spent[True] / max(sum(spent.values()), 1e-9)
    lags = share < REAL_SHARE
    wanted = [task for task in left if (task.model == scale.REAL_MODEL) == lags] or left

    def turn(task: scale.Task) -> float:
        count = counts[task.name]
        return count * (seconds[task.name] / count) ** 0.5 if count else 0.0

    return min(wanted, key=turn, default=None)


def measure(
    folder: Path,
    says: Callable[[str], None],
    *,
    known: Iterable[ScaledRecord] = (),
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run what is missing, and append each run to the log, until all tables are whole.

    Args:
        folder: Holds the log, the pretrained models (``models``; tables of a model begin once it
            is there), and what is made once.
        says: Told a line about each run.
        known: What was measured before, and is not in the log.
        within: Makes what each run is carried out in.
    """
    log = folder / scale.LOG
    tuners: dict[str, FineTuner] = {}
    records = merged(known, read(log, ScaledRecord))
    done = {record.key for record in records}

    def keep(record: ScaledRecord) -> None:
        append(log, record)
        records.append(record)
        done.add(record.key)

    while (task := following(records, ready(folder / "models"))) is not None:
        configurations = task.configurations()
        block = REAL_BLOCK if task.model == scale.REAL_MODEL else BLOCK
        todo = [pair for pair in scale.runs() if (task.name, *pair) not in done][:block]
        with within():
            own = _prepared(task, folder, tuners)
            if (task.name, UNTUNED, 0) not in done:
                keep(untuned(task, own))
        for number, seed in todo:
            with within():
                record = run(task, number, seed, configurations[number], own)
            keep(record)
            last = record.failure or f"{record.quality[-1]:+.3f}"
            says(f"{task.name} {number} seed {seed}: {last}, {record.seconds} s")


def _prepared(task: scale.Task, folder: Path, tuners: dict[str, FineTuner]) -> FineTuner:
    """Return a task's fine-tuner, kept for its next turn; of the real model one at a time."""
    if task.name not in tuners:
        if task.model == scale.REAL_MODEL:
            for name in [name for name in tuners if name.startswith(scale.REAL_MODEL)]:
                del tuners[name]
        own = tuners[task.name] = tuner(task, folder / "models", folder / "made")
        # Else the first run's seconds would hold the loading.
        own.prepare()
        own.baseline()
    # Two threads that wait for each other are slow where other work runs, or the model is small;
    # the results are the same.
    wide = tuners[task.name].traits()["hidden_size"] >= _WIDE
    torch.set_num_threads(2 if wide and os.getloadavg()[0] < _QUIET else 1)
    return tuners[task.name]
