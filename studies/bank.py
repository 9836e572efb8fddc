"""What a bank of response surfaces gives the first trials, on validation tasks.

    python studies/bank.py [--tasks 480] [--seed 12345] [--known]

Plays the first ten trials of synthetic tasks and of tasks cut out of the validation split's
tables, and prints the regret by group (0 the best known, 1 the median configuration): arithmetic
and geometric mean after 1, 2, 3, 5 and 10 trials. Below each group stands the paired difference of
log10 regret to the bank, 95% interval; positive where the bank is ahead. With ``--known`` the
tasks know something of model, data and run, as training tasks do (a third nothing, some what is
wrong), and half of those that charge for cost know what: the arms that are told so stand beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.learning import table_surfaces
from optuna_lora_rl.learning.environment import OPENINGS
from optuna_lora_rl.learning.environment import SETTINGS
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.tasks import GROUPS
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.validation import balanced
from optuna_lora_rl.learning.validation import bootstrap_interval
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.network import Scorer

TRIALS = (1, 2, 3, 5, 10)
BANK = "bank_then_gp"
_FLOOR = 0.01


def play(
    count: int, seed: int, processes: int, *, known: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Groups of the tasks, shape (B,), and regrets by arm, each of shape (B, 10)."""
    surfaces = table_surfaces.load("validation")
    drawn = draw_tasks(3 * count, seed, surfaces, constrained=False, contexts=known)
    told = balanced(drawn, count)
    # The same tasks for who is told nothing, or no costs.
    tasks = [replace(task, context=None, charges=False) for task in told]
    priceless = [replace(task, charges=False) for task in told]
    banked, network = replace(SETTINGS, bank=True), weights.load(None)
    with get_context("fork").Pool(
        processes, initializer=torch.set_num_threads, initargs=(1,)
    ) as p:
        arm: Callable[..., np.ndarray] = partial(
            _regret, tasks=tasks, length=max(TRIALS), seed=seed, run=partial(p.imap, chunksize=4)
        )
        regrets = {BANK: arm(None, settings=banked)}
        regrets |= {name: arm(None, opening=opening) for name, opening in OPENINGS.items()}
        regrets["shipped"] = arm(network)
        regrets["shipped, with the bank"] = arm(network, settings=banked)
        for name, own in (("context", priceless), ("context and cost", told)) * known:
            regrets[f"{BANK}, {name}"] = arm(None, settings=banked, tasks=own)
            regrets[f"shipped, {name}"] = arm(network, tasks=own)
    return np.array([task.group for task in tasks]), regrets


def _regret(network: Scorer | None, *, tasks: list[Task], **rest: Any) -> np.ndarray:
    return rollout_regret(tasks, rest.pop("length"), network, rest.pop("seed"), **rest)


def table(groups: np.ndarray, regrets: dict[str, np.ndarray]) -> str:
    """Regrets by group, as Markdown."""
    columns = [trial - 1 for trial in TRIALS]
    head = " | ".join(str(trial) for trial in TRIALS)
    parts = []
    for group in GROUPS:
        rows = np.flatnonzero(groups == group)
        lines = [f"**{group}** ({len(rows)} tasks): mean, geometric mean", ""]
        lines += [f"| | {head} |", "|---" * (len(TRIALS) + 1) + "|"]
        logs = {name: np.log10(r[rows][:, columns] + _FLOOR) for name, r in regrets.items()}
        for name, regret in regrets.items():
            means, middles = regret[rows][:, columns].mean(0), 10.0 ** logs[name].mean(0)
            cells = [f"{m:.3f}, {g:.3f}" for m, g in zip(means, middles, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for name in [other for other in regrets if other != BANK]:
            ahead = (logs[name] - logs[BANK]).T
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*bootstrap_interval(d, 0)) for d in ahead]
            lines.append(f"| log10 {name} - {BANK} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=480)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--known", action="store_true")
    given = parser.parse_args()
    print(table(*play(given.tasks, given.seed, given.processes, known=given.known)))
