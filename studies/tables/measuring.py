"""Measure what the tables still lack, with the package's own fine-tuning."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import Record
from optuna_lora_rl.learning.tables.records import append

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Iterable
    from collections.abc import Sequence
    from pathlib import Path

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.vocabulary import Value

EVALUATIONS = 4
VALIDATION_EXAMPLES = 64
FIRST_EVALUATION = 0.25
MAX_LENGTH = {"sources": 40}
"""Tokens that are read of an example, by family; 64 for the others, which few examples reach."""


def tuner(task: design.Task) -> FineTuner:
    """Return the fine-tuner of one task: on the processor, four evaluations a run."""
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions

    return FineTuner(
        ModelOptions(name=task.model),
        DataOptions(
            train=f"tiny:{task.family}-{task.size}",
            max_validation_samples=VALIDATION_EXAMPLES,
            max_length=MAX_LENGTH.get(task.family, 64),
        ),
        TrainingOptions(
            evaluations=EVALUATIONS,
            first_evaluation=FIRST_EVALUATION,
            eval_batch_size=VALIDATION_EXAMPLES,
            use_cpu=True,
        ),
        # The reference is the default configuration at the design's middling number of steps.
        ObjectiveOptions(reference={"max_steps": 32}),
    )


def untuned(task: str, own: FineTuner) -> Record:
    """Return the record of the model before any fine-tuning."""
    before = own.baseline()
    return Record(
        task=task,
        configuration=UNTUNED,
        step=[0],
        loss=[round(before.loss, 6)],
        accuracy=[round(before.token_accuracy, 5)],
        quality=[0.0],
    )


def run(
    task: str,
    number: int,
    seed: int,
    configuration: dict[str, Value],
    own: FineTuner,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Record:
    """Fine-tune once and return the record; a run that fails keeps the curve that it has."""
    from optuna_lora_rl.finetuning.errors import FineTuningError

    steps: list[int] = []
    curves: dict[str, list[float]] = {"loss": [], "token_accuracy": [], "quality": []}

    def report(step: int, score: float, metrics: Any) -> None:
        steps.append(step)
        for name, values in curves.items():
            values.append(round(metrics[name], 6))

    wanted, failure = design.tuned(configuration), None
    started = clock()
    try:
        own.run(wanted, seed=seed, report=report)
    except FineTuningError as error:
        failure = error.reason
    seconds = clock() - started
    counted, cost = own.estimate(wanted)
    sequences = int(wanted["max_steps"]) * int(wanted["batch_size"])
    return Record(
        task=task,
        configuration=number,
        seed=seed,
        parameters=configuration,
        step=steps,
        loss=curves["loss"],
        accuracy=curves["token_accuracy"],
        quality=curves["quality"],
        failure=failure,
        trainable_parameters=counted.trainable_parameters,
        tokens=round(sequences * own.traits()["mean_tokens"]),
        flops=counted.flops,
        bytes=counted.memory_bytes,
        cost=round(cost["total"], 6),
        seconds=round(seconds, 3),
    )


def measure(
    log: Path,
    known: Iterable[Record],
    tasks: Sequence[str],
    count: int,
    says: Callable[[str], None],
) -> None:
    """Run what is missing, and append each run to the log.

    Args:
        log: The JSONL file of new records.
        known: What was measured before, in the log or in a compiled file.
        tasks: Names of the tasks.
        count: Configurations of each.
        says: Told a line about each run.

    Raises:
        UserError: Records were made with another design.
    """
    drawn = design.configurations(count)
    done = set()
    for record in known:
        number = record.configuration
        if 0 <= number < count and record.parameters != drawn[number]:
            raise UserError(
                f"Configuration {number} of {record.task} was measured with other parameters than "
                "this design has; go on with the version of scipy that it was begun with."
            )
        done.add(record.key)
    tuners: dict[str, FineTuner] = {}

    def own(task: str) -> FineTuner:
        if task not in tuners:
            tuners[task] = tuner(design.TASKS[task])
            # Else the first run's seconds would hold the loading.
            tuners[task].prepare()
        return tuners[task]

    for task in tasks:
        if (task, UNTUNED, 0) not in done:
            append(log, untuned(task, own(task)))
    for task, number, seed in design.order(tasks, count):
        if (task, number, seed) not in done:
            record = run(task, number, seed, drawn[number], own(task))
            append(log, record)
            last = record.failure or f"{record.quality[-1]:+.3f}"
            says(f"{task} {number} seed {seed}: {last}, {record.seconds} s")
