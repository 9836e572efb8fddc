"""Measured runs of the built-in tasks: what to run, and the records of what was run.

A run is named by its task, its number of steps, its configuration's name and its seed. The names
are ``untuned``, ``default`` and ``random-00``, ``random-01``, ...: draws from the recommended
space, the same for every task. Each finished run is one line of a JSONL file, so that a stopped
measurement goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.space import LoraSpace
from optuna_lora_rl.vocabulary import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from optuna_lora_rl.vocabulary import Value

UNTUNED, DEFAULT = "untuned", "default"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One finished run.

    Args:
        task: Name of the built-in task.
        steps: Optimizer steps of the run; the untuned model bears the same number.
        configuration: ``untuned``, ``default`` or ``random-<number>``.
        seed: Seed of the run.
        loss: Validation loss at the end, nats a token; None where the run failed.
        seconds: Wall time of the run.
        failure: Why the run failed, or None.
        parameters: The tuned parameters.
    """

    task: str
    steps: int
    configuration: str
    seed: int
    loss: float | None
    seconds: float
    failure: str | None = None
    parameters: dict[str, Value]

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.task, self.steps, self.configuration, self.seed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure on each task.

    Args:
        configurations: Random configurations, each run with seed 0.
        seeds: Runs of the best one, its first included.
        steps: Optimizer steps of every run, of eight sequences each.
    """

    configurations: int = 30
    seeds: int = 5
    steps: int = 60

    def parameters(self) -> dict[str, dict[str, Value]]:
        """Return the parameters of each configuration: the default and the random ones."""
        import optuna

        space = LoraSpace.recommended()
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        tuned = sorted(space.distributions())
        default = {name: DEFAULTS[name] for name in tuned}
        drawn = [space.suggest(study.ask()) for _ in range(self.configurations)]
        return {DEFAULT: default} | {
            f"random-{number:02d}": {name: configuration[name] for name in tuned}
            for number, configuration in enumerate(drawn)
        }


def read(records: Path) -> list[Measurement]:
    """Return the finished runs of a records file; none where there is no file."""
    if not records.exists():
        return []
    lines = records.read_text(encoding="utf-8").splitlines()
    return [Measurement(**json.loads(line)) for line in lines if line.strip()]


def best_configuration(done: Iterable[Measurement]) -> str | None:
    """Return the name of the random configuration with the least loss at seed 0."""
    losses = {
        run.configuration: run.loss
        for run in done
        if run.seed == 0 and run.loss is not None and run.configuration.startswith("random-")
    }
    return min(losses, key=lambda name: losses[name]) if losses else None


def measure(task: str, plan: Plan, records: Path, tuner: Any) -> None:
    """Run what a task still lacks, and append each run to the records.

    Args:
        task: Name of the built-in task.
        plan: What to run.
        records: The JSONL file; workers on other tasks may write to it at the same time.
        tuner: A ``finetuning.FineTuner`` of this task.
    """
    done = {run.key: run for run in read(records) if (run.task, run.steps) == (task, plan.steps)}
    configurations = plan.parameters()

    def complete(name: str, seed: int) -> None:
        if (task, plan.steps, name, seed) not in done:
            run = _run(task, plan.steps, name, seed, configurations.get(name, {}), tuner)
            done[run.key] = run
            with records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(run)) + "\n")

    complete(UNTUNED, 0)
    for name in configurations:
        complete(name, 0)
    wanted = [run for run in done.values() if run.configuration in configurations]
    best = best_configuration(wanted)
    for seed in range(1, plan.seeds if best else 0):
        complete(str(best), seed)


def _run(
    task: str, steps: int, name: str, seed: int, parameters: dict[str, Value], tuner: Any
) -> Measurement:
    loss, failure, seconds = None, None, 0.0
    if name == UNTUNED:
        loss = float(tuner.baseline().loss)
    else:
        try:
            result = tuner.run(
                {**DEFAULTS, **parameters, "max_steps": steps}, seed=seed, report=_unheard
            )
            loss, seconds = float(result.metrics["loss"]), round(result.seconds, 2)
        except FineTuningError as error:
            failure = error.reason
    return Measurement(
        task=task,
        steps=steps,
        configuration=name,
        seed=seed,
        loss=loss,
        seconds=seconds,
        failure=failure,
        parameters=parameters,
    )


def _unheard(step: int, score: float, metrics: Any) -> None:
    """Take a report of a run under way: nothing is pruned here."""
