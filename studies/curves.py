"""Record learning curves of real LoRA fine-tuning runs on built-in tasks.

    python studies/curves.py --output studies/curves.jsonl

Each line is one run: its task, configuration, seed, cost relative to the default configuration's
run, and its quality (share of the untuned model's validation loss that is gone) at each of its
evaluations. Runs that the file already holds are not repeated, so a stopped recording goes on
where it was. One process, one thread; about four seconds a run.

The configurations are random draws, the same for every task. On each task three good ones and a
middling one are run with two further seeds, so that the noise of a score is known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Mapping
    from collections.abc import Sequence

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.vocabulary import Value

FOLDER = Path(__file__).resolve().parent

# The halves have no family in common: options are chosen on the first, judged on the second.
VALIDATION = ("dates-small", "cipher-ample", "docstrings-small", "units-small")
TEST = ("plurals-ample", "sources-ample", "arithmetic-small", "sorting-ample")
STEPS = 40
EVALUATIONS = 8
SEEDS = (0, 1, 2)
SPACE: dict[str, Any] = {
    "lora_rank": {"low": 2, "high": 64, "log": True},
    "lora_alpha": {"ratio": {"low": 0.5, "high": 8, "log": True}, "of": "lora_rank"},
    "learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "lora_dropout": {"low": 0.0, "high": 0.3},
    "target_modules": ["qv", "attention", "mlp", "all-linear"],
    "batch_size": [4, 8, 16],
    "max_steps": STEPS,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One recorded run.

    Attributes:
        task: Name of the built-in task.
        configuration: Number of the configuration.
        seed: Seed of the run.
        cost: Counted cost of the whole run; that of the default configuration is 1.
        quality: Quality at each evaluation, until the run ended or failed.
        failure: Why the run failed, or None.
        seconds: Wall time.
        parameters: The tuned parameters.
    """

    task: str
    configuration: int
    seed: int
    cost: float
    quality: list[float]
    failure: str | None
    seconds: float
    parameters: dict[str, Value]

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.configuration, self.seed


def read(path: Path) -> list[Curve]:
    """Return the recorded runs; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Curve(**json.loads(line)) for line in lines if line.strip()]


def configurations(count: int) -> list[dict[str, Value]]:
    """Return random configurations, the same at every call."""
    import optuna

    from optuna_lora_rl.space import LoraSpace

    space = LoraSpace(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=20))
    return [dict(space.suggest(study.ask())) for _ in range(count)]


def repeated(curves: Sequence[Curve]) -> list[int]:
    """Return the configurations to run with further seeds: the three best and the median one."""
    done = [run for run in curves if run.seed == 0 and not run.failure]
    ranked = sorted(done, key=lambda run: -run.quality[-1])
    return [run.configuration for run in (*ranked[:3], ranked[len(ranked) // 2])]


def wanted(tasks: Sequence[str], count: int, curves: Sequence[Curve]) -> Iterator[tuple[Any, ...]]:
    """Yield what is to be run: by blocks of configurations, so that tasks grow side by side.

    ``curves`` is read anew at each step, since what is repeated depends on the results.
    """
    block = max(1, count // 4)
    for start in range(0, count, block):
        for task in tasks:
            yield from ((task, number, 0) for number in range(start, min(count, start + block)))
            if start == block:
                own = [run for run in curves if run.task == task and run.configuration < 2 * block]
                yield from ((task, n, seed) for seed in SEEDS[1:] for n in repeated(own))


def tuner(task: str) -> FineTuner:
    """Return the fine-tuner of one task."""
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions

    return FineTuner(
        ModelOptions(),
        DataOptions(train=f"tiny:{task}", max_validation_samples=256),
        TrainingOptions(evaluations=EVALUATIONS, first_evaluation=1.0, use_cpu=True),
        ObjectiveOptions(reference={"max_steps": STEPS}),
    )


def run(
    own: FineTuner, task: str, number: int, seed: int, parameters: Mapping[str, Value]
) -> Curve:
    """Fine-tune once and return the curve."""
    from optuna_lora_rl.finetuning.errors import FineTuningError

    quality: list[float] = []
    cost, seconds, failure = 0.0, 0.0, None
    try:
        result = own.run(
            parameters,
            seed=seed,
            report=lambda step, score, metrics: quality.append(round(metrics["quality"], 5)),
        )
        cost, seconds = round(result.cost, 4), round(result.seconds, 2)
    except FineTuningError as error:
        failure = error.reason
    tuned = {name: parameters[name] for name in SPACE if name != "max_steps"}
    return Curve(
        task=task,
        configuration=number,
        seed=seed,
        cost=cost,
        quality=quality,
        failure=failure,
        seconds=seconds,
        parameters={
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in tuned.items()
        },
    )


def record(path: Path, tasks: Sequence[str], count: int) -> None:
    """Run what the file still lacks."""
    curves = read(path)
    drawn = configurations(count)
    tuners: dict[str, FineTuner] = {}
    for task, number, seed in wanted(tasks, count, curves):
        if (task, number, seed) in {run.key for run in curves}:
            continue
        if task not in tuners:
            tuners[task] = tuner(task)
        curve = run(tuners[task], task, number, seed, drawn[number])
        curves.append(curve)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(curve)) + "\n")
        last = f"{curve.quality[-1]:.4f}" if curve.quality else curve.failure
        print(f"{len(curves)} {task} {number} seed {seed}: {last}, {curve.seconds} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this file."""
    every = tuple(itertools.chain.from_iterable(zip(VALIDATION, TEST, strict=True)))
    parser = argparse.ArgumentParser(description="Record learning curves on built-in tasks.")
    parser.add_argument("--output", type=Path, default=FOLDER / "curves.jsonl")
    parser.add_argument("--tasks", default=",".join(every))
    parser.add_argument("--configurations", type=int, default=48)
    given = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record(given.output, given.tasks.split(","), given.configurations)


if __name__ == "__main__":
    sys.exit(main())
