"""What a bank of response surfaces gives the first trials, on validation tasks.

    python studies/bank.py [--tasks 480] [--seed 12345]

Plays the first ten trials of synthetic tasks and of tasks cut out of the validation split's
tables, and prints the regret by group (0 the best known, 1 the median configuration): arithmetic
and geometric mean after 1, 2, 3, 5 and 10 trials. Below each group stands the paired difference of
log10 regret to the bank, 95% interval; positive where the bank is ahead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch

from optuna_lora_rl.learning import table_surfaces
from optuna_lora_rl.learning.environment import OPENINGS
from optuna_lora_rl.learning.environment import SETTINGS
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.tasks import GROUPS
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.validation import balanced
from optuna_lora_rl.learning.validation import bootstrap_interval
from optuna_lora_rl.policy import weights

TRIALS = (1, 2, 3, 5, 10)
BANK = "bank_then_gp"
_FLOOR = 0.01


def play(count: int, seed: int, processes: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Groups of the tasks, shape (B,), and regrets by arm, each of shape (B, 10)."""
    surfaces = table_surfaces.load("validation")
    tasks = balanced(draw_tasks(3 * count, seed, surfaces, constrained=False), count)
    banked, network = replace(SETTINGS, bank=True), weights.load(None)
    with get_context("fork").Pool(
        processes, initializer=torch.set_num_threads, initargs=(1,)
    ) as p:
        arm: Callable[..., np.ndarray] = partial(
            rollout_regret, tasks, max(TRIALS), seed=seed, run=partial(p.imap, chunksize=4)
        )
        regrets = {BANK: arm(None, settings=banked)}
        regrets |= {name: arm(None, opening=opening) for name, opening in OPENINGS.items()}
        regrets["shipped"] = arm(network)
        regrets["shipped, with the bank"] = arm(network, settings=banked)
    return np.array([task.group for task in tasks]), regrets


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
    given = parser.parse_args()
    print(table(*play(given.tasks, given.seed, given.processes)))
