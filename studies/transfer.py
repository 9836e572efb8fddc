"""What earlier studies buy, and what a misleading one costs.

    python studies/transfer.py --tasks 24 --seeds 1 --output studies/results/transfer.json

Targets are synthetic LoRA tasks (``learning/tasks.py``, with a seed that no policy was trained
on). For each, three earlier studies of 25 trials by TPE on relatives of the target: the same
family of surface with its best learning rate, widths, gain by rank, overfitting and costs moved,
other ranges, partly other parameter names, partly the other direction and another scale of the
metric. Arms:

    none        no earlier studies
    related     the three of them
    one         the first of them alone
    mixed       two of them and one negated
    negated     three whose scores are turned round: their best is their worst
    shifted     three whose best learning rate lies two decades away
    unrelated   three of another task

Regret is 0 at the target's best known configuration and 1 at the median one, without noise.
Differences "none minus arm" of log10 regret (floored at 0.01) are paired over tasks and seeds,
with 95% bootstrap intervals over tasks; above 0 the arm is ahead.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from optuna_lora_rl import RLSampler
from optuna_lora_rl.learning.surfaces import Surface
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout

ARMS = ("none", "related", "one", "mixed", "negated", "shifted", "unrelated")
AFTER = (1, 3, 5, 10, 15)
SOURCE_TRIALS = 25
_RENAMED = {"learning_rate": "lr", "lora_rank": "r", "lora_alpha": "alpha", "batch_size": "bs"}


@dataclass
class Problem:
    """A surface over a space of its own.

    Args:
        space: its parameters.
        surface: what configurations score.
        unit: what one unit of regret is in the surface's value.
        noise: deviation of a run, in units.
        scale: of the value that is told; below 0 the study minimises.
    """

    space: Space
    surface: Surface
    unit: float
    noise: float
    scale: float = 1.0

    def value(self, params: Mapping[str, Any]) -> float:
        """Without noise, in units; raises FloatingPointError for a run that fails."""
        value, failed = self.surface(self.space.encode(params)[None], Layout(self.space))
        if failed[0]:
            raise FloatingPointError
        return float(value[0]) / self.unit

    def study(
        self, sampler: optuna.samplers.BaseSampler, trials: int, seed: int
    ) -> tuple[optuna.Study, list[float]]:
        """A study of the problem, and the noise-free value of each trial (-inf if it failed)."""
        rng, found = np.random.default_rng(seed), list[float]()

        def objective(trial: optuna.Trial) -> float:
            params = {d.name: suggest(trial, d) for d in self.space.dimensions}
            noise = self.noise * rng.normal()
            found.append(-np.inf)
            found[-1] = self.value(params)
            return self.scale * (found[-1] + noise)

        direction = "maximize" if self.scale > 0 else "minimize"
        study = optuna.create_study(sampler=sampler, direction=direction)
        study.optimize(objective, n_trials=trials, catch=FloatingPointError)
        return study, found


def suggest(trial: optuna.Trial, dimension: Dimension) -> object:
    """Ask a trial for the parameter of a dimension."""
    if dimension.kind == "categorical":
        return trial.suggest_categorical(dimension.name, dimension.choices)
    if dimension.kind == "int":
        low, high = round(dimension.low), round(dimension.high)
        return trial.suggest_int(dimension.name, low, high, log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def targets(count: int, seed: int) -> list[tuple[Problem, float, float]]:
    """LoRA tasks as problems, each with its best value and its median, in units."""
    tasks = draw_tasks(3 * count, seed)
    return [_target(task) for task in tasks if task.truth[0] > 0][:count]


def _target(task: Task) -> tuple[Problem, float, float]:
    unit = task.best - task.median
    return (
        Problem(task.space, task.surface, unit, task.noise),
        task.best / unit,
        task.median / unit,
    )


def relative(
    problem: Problem, rng: np.random.Generator, *, decades: float = 0.0, sign: float = 1.0
) -> Problem:
    """A task like ``problem``: another model, other data, other ranges, other units.

    Args:
        problem: the target.
        rng: of what differs.
        decades: by which the best learning rate moves besides.
        sign: -1 turns the scores round.
    """
    old = problem.surface

    def noise(values: np.ndarray | float, deviation: float) -> np.ndarray:
        return deviation * rng.normal(size=np.shape(values))

    surface = replace(
        old,
        peak=old.peak + float(noise(old.peak, 0.15)) + decades,
        ridge=old.ridge + noise(old.ridge, 0.1),
        width=old.width * np.exp(noise(old.width, 0.15)),
        capacity=old.capacity * np.exp(noise(old.capacity, 0.15)),
        overfit=old.overfit * np.exp(noise(old.overfit, 0.2)),
        cost=old.cost * np.exp(noise(old.cost, 0.3)),
        cliff=old.cliff + float(noise(old.cliff, 0.1)),
        places=old.places + noise(old.places, 0.1),
        minor=old.minor * np.exp(noise(old.minor, 0.3)),
    )
    rename = bool(rng.random() < 0.5)
    space = make_space([_other_range(d, rng, rename) for d in problem.space.dimensions])
    scale = sign * float(rng.choice([1.0, 100.0, -1.0, -0.02]))
    if sign < 0:  # negated scores under the same direction
        scale = -abs(scale)
        return _Negated(space, surface, problem.unit, problem.noise, scale)
    return Problem(space, surface, problem.unit, problem.noise, scale)


class _Negated(Problem):
    """Tells the scores of ``Problem`` with the wrong sign and the right direction."""

    def value(self, params: Mapping[str, Any]) -> float:
        return -super().value(params)


def _other_range(dimension: Dimension, rng: np.random.Generator, rename: bool) -> Dimension:
    name = _RENAMED.get(dimension.name, dimension.name) if rename else dimension.name
    if dimension.role == "learning_rate":
        low, high = 10.0 ** rng.uniform(-0.7, 0.7, 2)
        return replace(dimension, name=name, low=dimension.low * low, high=dimension.high * high)
    return replace(dimension, name=name)


def run_task(
    problem: Problem, other: Problem, best: float, median: float, seed: int, arms: Sequence[str]
) -> dict[str, list[float]]:
    """Regret after each trial, by arm."""
    sources = _sources(problem, other, seed, arms)
    regrets = {}
    for arm in arms:
        sampler = RLSampler(seed=seed, source_studies=sources[arm])
        _, found = problem.study(sampler, max(AFTER), seed)
        regret = (best - np.maximum.accumulate(found)) / (best - median)
        regrets[arm] = [round(float(r), 5) for r in np.clip(regret, 0.0, 3.0)]
    return regrets


def _sources(
    problem: Problem, other: Problem, seed: int, arms: Sequence[str]
) -> dict[str, list[optuna.Study]]:
    def studies(kind: int, of: Problem, **how: float) -> list[optuna.Study]:
        made = []
        for k in range(3):
            rng = np.random.default_rng([seed, kind, k])
            sampler = optuna.samplers.TPESampler(seed=1000 * seed + 10 * kind + k)
            study = relative(of, rng, **how).study(sampler, SOURCE_TRIALS, seed + k)[0]
            # A study in which nearly every run diverged teaches nothing.
            if len(study.get_trials(states=(TrialState.COMPLETE,))) >= 3:
                made.append(study)
        return made

    away = -2.0 if problem.surface.peak > -3.6 else 2.0
    kinds = {
        "related": lambda: studies(0, problem),
        "negated": lambda: studies(1, problem, sign=-1.0),
        "shifted": lambda: studies(2, problem, decades=away),
        "unrelated": lambda: studies(3, other),
    }
    needed = set(arms) | ({"related"} & {"related"} if {"one", "mixed"} & set(arms) else set())
    needed |= {"negated"} if "mixed" in arms else set()
    made = {kind: make() for kind, make in kinds.items() if kind in needed}
    related, negated = made.get("related", []), made.get("negated", [])
    return {**made, "none": [], "one": related[:1], "mixed": related[:2] + negated[:1]}


def interval(differences: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """Mean over tasks, shape (tasks,), and its 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(differences), size=(draws, len(differences)))
    low, high = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def table(results: Mapping[str, Mapping[str, list[float]]], arms: Sequence[str]) -> str:
    """Mean regret and paired differences after some trials, as Markdown."""
    tasks = sorted({key.split("/")[0] for key in results})
    by_task = {
        arm: np.array(
            [[results[k][arm] for k in sorted(results) if k.split("/")[0] == t] for t in tasks]
        )
        for arm in arms
    }  # each (tasks, seeds, trials)
    lines = ["| earlier studies | " + " | ".join(f"{k} trials" for k in AFTER) + " |"]
    lines.append("|---" * (len(AFTER) + 1) + "|")
    for arm in arms:
        means = [f"{by_task[arm][:, :, k - 1].mean():.3f}" for k in AFTER]
        lines.append(f"| {arm} | " + " | ".join(means) + " |")
    for arm in arms[1:]:
        cells = []
        for k in AFTER:
            logs = [np.log10(by_task[a][:, :, k - 1] + 0.01).mean(1) for a in ("none", arm)]
            mean, low, high = interval(logs[0] - logs[1])
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| log10 none - {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--task-seed", type=int, default=777_000_003, help="of the targets")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--output", type=Path, default=Path("studies/results/transfer.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    what = {"task_seed": given.task_seed, "source_trials": SOURCE_TRIALS, "arms": given.arms}
    done = json.loads(given.output.read_text()) if given.output.is_file() else {}
    same = all(done.get("settings", {}).get(key) == value for key, value in what.items())
    results = done["regret"] if same else {}
    problems = targets(given.tasks + 1, given.task_seed)
    versions = {"optuna": optuna.__version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    began = time.monotonic()
    for seed in range(given.seeds):
        for i in range(given.tasks):
            if f"{i}/{seed}" in results:
                continue
            (problem, best, median), other = problems[i], problems[i + 1][0]
            results[f"{i}/{seed}"] = run_task(problem, other, best, median, seed, given.arms)
            record = {"settings": what, "versions": versions, "regret": results}
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(record, indent=0) + "\n")
            print(f"task {i} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    wanted = {f"{i}/{seed}" for i in range(given.tasks) for seed in range(given.seeds)}
    results = {key: results[key] for key in results if key in wanted}
    record = {"settings": what, "versions": versions, "regret": results}
    given.output.write_text(json.dumps(record, indent=0) + "\n")
    text = table(results, given.arms)
    command = f"python studies/transfer.py --tasks {given.tasks} --seeds {given.seeds}"
    command += f" --arms {' '.join(given.arms)}"
    head = f"    {command}\n\n({', '.join(f'{k} {v}' for k, v in versions.items())})\n\n"
    given.output.with_suffix(".md").write_text(head + text + "\n")
    print(text)


if __name__ == "__main__":
    main()
