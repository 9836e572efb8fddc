"""Replay recorded learning curves through every pruner: what it saves, and what it costs.

    python studies/pruner_replay.py

Reads ``studies/curves.jsonl`` (``studies/curves.py`` recorded it) and writes
``studies/results/pruner_replay.json`` and ``.md``. A replayed study takes recorded runs of one
task in random order, one at a time or eight side by side, where each run that ends makes way for
the next. The clock ticks once an evaluation. Pruners see real Optuna trials in a real study.

``--select`` replays the options that our pruners' defaults were chosen among, on the tasks of the
first half; the report is on the second half, which has no family of tasks in common with it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from curves import EVALUATIONS
from curves import FOLDER
from curves import TEST
from curves import VALIDATION
from curves import Curve
from curves import read

from optuna_lora_rl import pruners

COST_WEIGHT = 0.1
# Whole runs' worth of compute, where pruners are compared at equal compute.
BUDGET = 12
SIDE_BY_SIDE = (1, 8)
OURS = ("async-halving", "peer-median", "cost-aware")
OPTUNAS = ("median", "percentile", "successive-halving", "hyperband", "patient")
# Without a pruner, once with each kind of objectives: what pruning is measured against.
NOBODY = {"none": "none", "none-of-two": "none"}
TWO_OBJECTIVES = ("none-of-two", "pareto")
CHOICES: dict[str, list[dict[str, Any]]] = {
    "async-halving": [
        {"reduction_factor": factor, "n_min_trials": least}
        for factor in (2, 3, 4)
        for least in (2, 4, 8)
    ],
    "peer-median": [
        {"percentile": percentile, "n_min_trials": least}
        for percentile in (50.0, 33.0, 25.0)
        for least in (2, 4, 8)
    ],
    "cost-aware": [
        {"probability": probability, "n_startup_trials": least}
        for probability in (0.02, 0.05, 0.1, 0.2)
        for least in (2, 4)
    ],
    "pareto": [
        {"probability": probability, "n_startup_trials": 4}
        for probability in (0.02, 0.05, 0.1, 0.2)
    ],
}


@dataclass(frozen=True)
class Task:
    """What was recorded of one task.

    Attributes:
        name: The built-in task.
        quality: Curves of the runs that came to their end, shape (N, S).
        cost: Cost of each run, shape (N,).
        noise: Standard deviation of a good configuration's final quality over seeds.
    """

    name: str
    quality: np.ndarray
    cost: np.ndarray
    noise: float

    @property
    def measured_noise(self) -> float | None:
        """The noise to five digits, or None where no configuration was run with more seeds."""
        return None if math.isnan(self.noise) else round(self.noise, 5)

    @property
    def score(self) -> np.ndarray:
        """What a study reports: quality less the charge for the whole run's cost."""
        return self.quality - COST_WEIGHT * self.cost[:, None]


@dataclass(frozen=True)
class Setting:
    """How a study is replayed.

    Attributes:
        pruner: Name of the pruner.
        options: Its options.
        workers: Trials side by side.
        evaluations: Reports of each trial; fewer than recorded take every second one.
    """

    pruner: str
    options: Mapping[str, Any]
    workers: int
    evaluations: int = EVALUATIONS


def tasks_of(runs: Sequence[Curve], names: Sequence[str]) -> list[Task]:
    """Collect the recorded runs by task."""
    tasks = []
    for name in names:
        own = [run for run in runs if run.task == name and not run.failure]
        first = [run for run in own if run.seed == 0]
        if not first:
            continue
        ends: dict[int, list[float]] = {}
        for run in own:
            ends.setdefault(run.configuration, []).append(run.quality[-1])
        spreads = [np.var(values, ddof=1) for values in ends.values() if len(values) > 1]
        tasks.append(
            Task(
                name=name,
                quality=np.array([run.quality for run in first]),
                cost=np.array([run.cost for run in first]),
                noise=float(np.sqrt(np.mean(spreads))) if spreads else float("nan"),
            )
        )
    return tasks


def replay(
    task: Task, order: np.ndarray, setting: Setting, *, budget: float = math.inf
) -> tuple[int, list[int]]:
    """Replay one study; returns the evaluations done, and the runs that came to their end.

    Args:
        task: The recorded runs.
        order: Which of them, in the order in which they are started.
        setting: How.
        budget: Evaluations after which the study ends, whatever is still running.
    """
    stride = EVALUATIONS // setting.evaluations
    several = setting.pruner in TWO_OBJECTIVES
    curves = (task.quality if several else task.score)[:, stride - 1 :: stride]
    study = optuna.create_study(
        directions=["maximize", "minimize"] if several else ["maximize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=pruners.create(
            NOBODY.get(setting.pruner, setting.pruner),
            setting.options,
            first_step=1,
            last_step=setting.evaluations,
        ),
        # Hyperband draws a trial's bracket from the study's name.
        study_name="replay",
    )
    waiting = list(reversed(order.tolist()))
    running: list[tuple[optuna.Trial, int, int]] = []
    done, completed = 0, []
    while (waiting or running) and done < budget:
        while waiting and len(running) < setting.workers:
            running.append((study.ask(), waiting.pop(), 0))
        going = []
        for trial, row, seen in running:
            value = float(curves[row, seen])
            values = (value, float(task.cost[row])) if several else (value,)
            pruners.report(trial, values, seen + 1)
            done += 1
            if seen + 1 == setting.evaluations:
                study.tell(trial, list(values))
                completed.append(row)
            elif pruners.should_prune(trial):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                going.append((trial, row, seen + 1))
        running = going
    return done, completed


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Area between a front of (quality, cost) and a reference point, larger and smaller better."""
    area, best = 0.0, float(reference[0])
    ahead = points[(points[:, 0] > reference[0]) & (points[:, 1] < reference[1])]
    for quality, cost in ahead[np.lexsort((-ahead[:, 0], ahead[:, 1]))]:
        if quality > best:
            area += (quality - best) * (reference[1] - cost)
            best = quality
    return float(area)


def lost_hypervolume(everything: np.ndarray, found: np.ndarray) -> float:
    """Share of the area of all points of (quality, cost) that those found do not cover."""
    reference = np.array([everything[:, 0].min(), everything[:, 1].max()])
    return 1 - hypervolume(found, reference) / hypervolume(everything, reference)


def measure(
    task: Task, permutation: np.ndarray, trials: int, setting: Setting
) -> tuple[float, float, float, float]:
    """Replay one study twice: with so many trials, and with a budget of compute.

    Returns:
        The share of steps saved; regret, how far the best finished score is from the best score
        of the study's trials, as a share of the gap from best to median; the same in units of the
        noise; and the regret at equal compute, how far the best score finished within the compute
        of ``BUDGET`` whole runs is from the best of all that was recorded, as a share of the gap.
        With two objectives the regret is the share of the hypervolume that is lost.
    """
    order = permutation[:trials]
    done, completed = replay(task, order, setting)
    _, within = replay(task, permutation, setting, budget=BUDGET * setting.evaluations)
    saved = 1 - done / (len(order) * setting.evaluations)
    if setting.pruner in TWO_OBJECTIVES:
        points = np.column_stack([task.quality[:, -1], task.cost])
        lost = lost_hypervolume(points[order], points[completed])
        return saved, lost, math.nan, lost_hypervolume(points, points[within])
    ends = task.score[:, -1]
    best, middle = float(ends[order].max()), float(np.median(ends[order]))
    regret = best - float(ends[completed].max())
    far = float(ends.max() - ends[within].max()) / float(ends.max() - np.median(ends))
    return saved, regret / (best - middle), regret / task.noise, far


def measure_all(
    tasks: Sequence[Task], setting: Setting, *, orders: int, trials: int
) -> np.ndarray:
    """Replay every task in the same random orders; shape (tasks, orders, 4)."""
    out = np.zeros((len(tasks), orders, 4))
    for row, task in enumerate(tasks):
        for number in range(orders):
            rng = np.random.default_rng([row, number])
            permutation = rng.permutation(len(task.cost))
            out[row, number] = measure(task, permutation, trials, setting)
    return out


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean over tasks and orders, and its 95% bootstrap interval over tasks, then orders."""
    rng = np.random.default_rng(0)
    # Tasks whose noise was not measured have no regret in its units.
    values = values[np.isfinite(values).all(axis=1)]
    tasks, orders = values.shape
    if not tasks:
        return math.nan, math.nan, math.nan
    rows = rng.integers(tasks, size=(draws, tasks, 1))
    columns = rng.integers(orders, size=(draws, tasks, orders))
    low, high = np.quantile(values[rows, columns].mean(axis=(1, 2)), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def summary(setting: Setting, outcome: np.ndarray) -> dict[str, Any]:
    """One line of the results."""
    saved, regret, in_noise, equal = (outcome[:, :, column] for column in range(4))
    return {
        "pruner": setting.pruner,
        "options": dict(setting.options),
        "workers": setting.workers,
        "evaluations": setting.evaluations,
        "saved": interval(saved),
        "regret": interval(regret),
        "regret_in_noise": interval(in_noise),
        "regret_at_equal_compute": interval(equal),
        "lost_the_best": float(np.mean(regret > 0)),
        "by_task_saved": saved.mean(axis=1).round(4).tolist(),
        "by_task_regret": regret.mean(axis=1).round(4).tolist(),
    }


def run(
    tasks: Sequence[Task],
    settings: Sequence[Setting],
    *,
    orders: int,
    trials: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Replay every setting."""
    lines = []
    for setting in settings:
        line = summary(setting, measure_all(tasks, setting, orders=orders, trials=trials))
        lines.append(line)
        say(row_of(line))
    return lines


def row_of(line: Mapping[str, Any]) -> str:
    """One row of a markdown table."""
    options = ", ".join(f"{key} {value}" for key, value in line["options"].items())
    saved, regret, in_noise, equal = (
        f"{mean:{form}} [{low:{form}}, {high:{form}}]"
        for (mean, low, high), form in (
            (line["saved"], ".0%"),
            (line["regret"], ".1%"),
            (line["regret_in_noise"], ".2f"),
            (line["regret_at_equal_compute"], ".1%"),
        )
    )
    name = f"`{NOBODY.get(line['pruner'], line['pruner'])}`" + (f" ({options})" if options else "")
    cells = [name, line["workers"], line["evaluations"], saved, regret]
    cells += [] if line["pruner"] in TWO_OBJECTIVES else [in_noise]
    cells.append(equal)
    return "| " + " | ".join(map(str, cells)) + " |"


def everywhere(
    pruners_options: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[Setting]:
    """Each pruner alone and side by side, with 8 and with 4 reports a run."""
    return [
        Setting(name, options, workers, evaluations)
        for evaluations in (8, 4)
        for workers in SIDE_BY_SIDE
        for name, options in pruners_options
    ]


def report(facts: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    single = [line for line in lines if line["pruner"] not in TWO_OBJECTIVES]
    several = [line for line in lines if line["pruner"] in TWO_OBJECTIVES]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    tasks = ", ".join(
        f"`{name}` ({task['runs']} runs, noise {task['noise'] or 'not measured'})"
        for name, task in facts["tasks"].items()
    )
    head = "| pruner | side by side | reports a run | steps saved |"
    return "\n".join(
        [
            f"    {facts['command']}",
            "",
            f"{versions}.",
            "",
            f"Tasks: {tasks}. Noise: standard deviation of a run's final quality over seeds.",
            "",
            f"Means over tasks and {facts['orders']} random orders of {facts['trials']} runs, "
            "with 95% bootstrap intervals over both. Regret: how far the best run that came to "
            "its end is from the best of the study's runs; the gap is that from best to median. "
            f"At equal compute: how far the best run that ended within the compute of {BUDGET} "
            "whole runs is from the best of all recorded, where what is saved goes into further "
            "runs.",
            "",
            head + " regret, share of the gap | regret, in noise | regret at equal compute |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *map(row_of, single),
            "",
            "Quality and cost as two objectives; regret is the share of the hypervolume lost.",
            "",
            head + " hypervolume lost | lost at equal compute |",
            "|---|--:|--:|--:|--:|--:|",
            *map(row_of, several),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Replay recorded curves through pruners.")
    parser.add_argument("--curves", type=Path, default=FOLDER / "curves.jsonl")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "pruner_replay")
    parser.add_argument("--orders", type=int, default=20, help="replayed studies of a task")
    parser.add_argument("--trials", type=int, default=24, help="of a replayed study")
    parser.add_argument("--select", action="store_true", help="replay the options instead")
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = read(given.curves)
    output = given.output.with_name(given.output.name + ("_options" if given.select else ""))
    tasks = tasks_of(recorded, VALIDATION if given.select else TEST)
    choices = (("median", [{}]), *CHOICES.items())
    options = [(name, option) for name, some in choices for option in some]
    defaults: list[tuple[str, Mapping[str, Any]]] = [
        (name, {}) for name in ("none", *OURS, *OPTUNAS, "none-of-two", "pareto")
    ]
    wanted = everywhere(options if given.select else defaults)

    def say(line: str) -> None:
        print(line, flush=True)

    lines = run(tasks, wanted, orders=given.orders, trials=given.trials, say=say)
    command = "python studies/pruner_replay.py" + (" --select" if given.select else "")
    facts = {
        "command": f"{command} --orders {given.orders} --trials {given.trials}",
        "versions": {name: version(name) for name in ("optuna", "numpy", "scipy")}
        | {"python": platform.python_version()},
        "tasks": {
            task.name: {"runs": len(task.cost), "noise": task.measured_noise} for task in tasks
        },
        "orders": given.orders,
        "trials": given.trials,
        "cost_weight": COST_WEIGHT,
    }
    output.parent.mkdir(exist_ok=True)
    written = json.dumps({**facts, "results": lines}, indent=1)
    output.with_suffix(".json").write_text(written + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(report(facts, lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
