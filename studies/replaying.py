"""Recorded learning curves, replayed through a pruner in a study of real Optuna trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from curves import EVALUATIONS
from curves import Curve

from optuna_lora_rl import pruners

COST_WEIGHT = 0.1
# Whole runs' worth of compute, where pruners are compared at equal compute.
BUDGET = 12
# Without a pruner, once with each kind of objectives: what pruning is measured against.
NOBODY = {"none": "none", "none-of-two": "none"}
TWO_OBJECTIVES = ("none-of-two", "pareto")


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
