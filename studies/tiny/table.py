"""Measure how much there is to tune on each built-in task, and write the table of it.

    python -m studies.tiny.table --size small --configurations 30 --workers 2

Every run is a real LoRA fine-tuning of the built-in model with the same number of steps. Runs
that the records already hold are not repeated, so the same command also regenerates the table.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.tiny.tasks import FAMILIES
from optuna_lora_rl.tiny.tasks import TASKS
from optuna_lora_rl.tiny.tasks import TRAINING_SIZES
from studies.tiny.measurements import DEFAULT
from studies.tiny.measurements import UNTUNED
from studies.tiny.measurements import Measurement
from studies.tiny.measurements import Plan
from studies.tiny.measurements import best_configuration
from studies.tiny.measurements import measure
from studies.tiny.measurements import read

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence

_PACKAGES = ("torch", "transformers", "peft", "trl", "optuna")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: losses on the validation split, nats a token.

    Args:
        task: Name of the built-in task.
        untuned: Loss of the model as it is.
        default: Loss with the default configuration.
        median: Median over the random configurations, a failed run counted as the worst.
        best: The best random configuration, the mean over its seeds.
        noise: Standard deviation over those seeds.
        failed: Random configurations that failed.
        runs: Random configurations measured.
    """

    task: str
    untuned: float
    default: float
    median: float
    best: float
    noise: float
    failed: int
    runs: int

    @property
    def gap_in_noise(self) -> float:
        """The best-to-median gap as a multiple of the seed noise."""
        return (self.median - self.best) / self.noise if self.noise > 0 else float("inf")

    def markdown(self) -> str:
        removed = (self.untuned - self.best) / self.untuned
        cells = [
            f"`{self.task}`",
            *(f"{loss:.3f}" for loss in (self.untuned, self.default, self.median, self.best)),
            f"{removed:.0%}",
            f"{self.noise:.4f}",
            f"{self.gap_in_noise:.1f}",
            f"{self.failed} of {self.runs}",
        ]
        return f"| {' | '.join(cells)} |"


_HEADER = (
    "| task | untuned | default | median | best | removed by the best | seed noise "
    "| gap / noise | failed |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def summarise(task: str, plan: Plan, measurements: Iterable[Measurement]) -> Row | None:
    """Return the row of one task, or None while runs that it needs are missing."""
    mine = {
        (run.configuration, run.seed): run
        for run in measurements
        if (run.task, run.steps) == (task, plan.steps)
    }
    names = [f"random-{number:02d}" for number in range(plan.configurations)]
    if not {(UNTUNED, 0), (DEFAULT, 0), *((name, 0) for name in names)} <= set(mine):
        return None
    drawn = [mine[name, 0] for name in names]
    best = best_configuration(drawn)
    again = [mine.get((str(best), seed)) for seed in range(plan.seeds)]
    losses = [_loss(run) for run in again if run]
    if best is None or len(losses) < plan.seeds:
        return None
    return Row(
        task=task,
        untuned=_loss(mine[UNTUNED, 0]),
        default=_loss(mine[DEFAULT, 0]),
        median=statistics.median(_loss(run) for run in drawn),
        best=statistics.mean(losses),
        noise=statistics.stdev(losses),
        failed=sum(run.failure is not None for run in drawn),
        runs=len(drawn),
    )


def _loss(run: Measurement) -> float:
    return float("inf") if run.loss is None else run.loss


def document(rows: Sequence[Row], plan: Plan, *, command: str, records: Path) -> str:
    """Return the page: the table, what its columns mean, and the command that made it."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    lines = "\n".join(row.markdown() for row in rows)
    clear = sum(row.gap_in_noise > 3 for row in rows)
    return f"""# What there is to tune on the built-in tasks

Each run fine-tunes the built-in model for {plan.steps} steps of 8 sequences. The numbers are
validation losses in nats a token: of the untuned model, of the default configuration (rank 8,
alpha 16, learning rate 2e-4), and the median and best of {plan.configurations} random
configurations of the recommended space. "Best" is the mean over {plan.seeds} seeds of the
configuration that was best with the first one, "seed noise" the standard deviation over them;
"removed by the best" is the share of the untuned loss that it removes. A failed run counts as
worse than any other. The gap between median and best is over 3 times the noise in {clear} of
{len(rows)} tasks.

{_HEADER}
{lines}

Made by

    {command}

with Python {platform.python_version()},
{versions}.
Every run is recorded in `{records.as_posix()}`; the same command goes on with a measurement that
was stopped.
"""


def measure_task(task: str, plan: Plan, records: Path) -> str:
    """Measure one task in this process, on one thread, and return its name."""
    import optuna
    import torch

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    tuner = FineTuner(
        model=ModelOptions(name="tiny"),
        data=DataOptions(train=f"tiny:{task}", max_validation_samples=256),
        training=TrainingOptions(evaluations=1, use_cpu=True),
        objective=ObjectiveOptions(metric="loss"),
    )
    measure(task, plan, records, tuner)
    return task


def measure_all(tasks: Sequence[str], plan: Plan, records: Path, *, workers: int) -> None:
    """Measure the tasks, ``workers`` of them at a time, each in a process of its own."""
    records.parent.mkdir(parents=True, exist_ok=True)
    # The children read this when they start: their matrices are too small to share threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(measure_task, task, plan, records) for task in tasks]
        for finished in as_completed(running):
            row = summarise(finished.result(), plan, read(records))
            print(row.markdown() if row else f"{finished.result()}: incomplete", flush=True)


def chosen_tasks(families: Sequence[str], size: str) -> list[str]:
    """Return the tasks of the given families (all where none is given) in one or both sizes."""
    sizes = TRAINING_SIZES if size == "both" else (size,)
    names = [f"{family}-{one}" for one in sizes for family in families or FAMILIES]
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"There is no family {unknown[0].rsplit('-', 1)[0]!r} among {FAMILIES}.")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure what is missing and write the page."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Measure the built-in tasks.")
    parser.add_argument("--size", choices=(*TRAINING_SIZES, "both"), default="small")
    parser.add_argument("--families", nargs="*", default=[], help="all where none is given")
    parser.add_argument("--configurations", type=int, default=Plan.configurations)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--workers", type=int, default=1, help="tasks measured at a time")
    parser.add_argument("--records", type=Path, default=Path("studies/tiny_tasks.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/tiny_tasks.md"))
    options = parser.parse_args(given)
    plan = Plan(configurations=options.configurations, seeds=options.seeds, steps=options.steps)
    tasks = chosen_tasks(options.families, options.size)
    measure_all(tasks, plan, options.records, workers=options.workers)
    measured = read(options.records)
    rows = [row for row in (summarise(task, plan, measured) for task in tasks) if row]
    command = shlex.join(["python", "-m", "studies.tiny.table", *given])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    page = document(rows, plan, command=command, records=options.records)
    options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
