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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from curves import FOLDER
from curves import TEST
from curves import VALIDATION
from curves import read
from replaying import BUDGET
from replaying import COST_WEIGHT
from replaying import NOBODY
from replaying import TWO_OBJECTIVES
from replaying import Setting
from replaying import Task
from replaying import measure_all
from replaying import tasks_of

SIDE_BY_SIDE = (1, 8)
OURS = ("async-halving", "peer-median", "cost-aware")
OPTUNAS = ("median", "percentile", "successive-halving", "hyperband", "patient")
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
