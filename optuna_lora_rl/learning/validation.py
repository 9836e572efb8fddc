"""How good a policy is on tasks kept apart, beside what experts and libraries would do.

Notations
    B         tasks, G groups of them
    regret    after each trial, shape (B, T)
    opponents the residual policy without network ("defaults_then_gp"), an expert's sweep and then
              the same process ("sweep_then_gp"), ten random trials and then that ("gp"); where
              networks see surfaces also the surfaces without network ("surfaces_then_gp")

A lead is a difference of mean log10 regrets, positive where the policy is ahead: 0.3 is half the
opponent's regret. No opponent wins in every group, so the policy is held against the best one of
each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import numpy as np

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.learning.environment import OPENINGS
from optuna_lora_rl.learning.environment import WIDE
from optuna_lora_rl.learning.environment import Map
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.tasks import GROUPS
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.network import Scorer

CHECKPOINTS = (1, 3, 5, 10, 20, 50)
_FLOOR = 0.01


def balanced(tasks: Sequence[Task], count: int) -> list[Task]:
    """About ``count`` of the tasks, equally many of each group that there is."""
    groups = [[task for task in tasks if task.group == group] for group in GROUPS]
    present = [group for group in groups if group]
    each = max(1, count // len(present))
    return [task for group in present for task in group[:each]]


def log_regret(regret: np.ndarray) -> np.ndarray:
    """log10 of the regret at the checkpoints, floored at 0.01, shape (B, K)."""
    columns = [k - 1 for k in CHECKPOINTS if k <= regret.shape[1]]
    return np.asarray(np.log10(regret[:, columns] + _FLOOR))


def bootstrap_interval(
    differences: np.ndarray, seed: int, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of paired differences and its 95% bootstrap interval."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(differences), size=(draws, len(differences)))
    low, high = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


@dataclass
class Validation:
    """Tasks, the opponents' regret on them, and the comparison of a network with it.

    Args:
        tasks: the problems.
        length: trials a study.
        seed: of candidates and noise, the same for all policies.
        run: applies a function to jobs.
        on_activity: told how many opponents have run.
        wide: whether the networks see surfaces; these without a network are then what a network
            starts from.
        opponents: log10 regret at the checkpoints by opponent, each of shape (B, K).
    """

    tasks: Sequence[Task]
    length: int
    seed: int
    run: Map = map
    on_activity: OnActivity = unseen
    wide: bool = False
    opponents: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        names = counted(OPENINGS, "running the opponents", "", self.on_activity)
        self.opponents = {name: self._regret(None, name) for name in names}
        if self.wide:
            self.opponents["surfaces_then_gp"] = self._regret(None, "defaults_then_gp", WIDE)

    @property
    def checkpoints(self) -> list[int]:
        """Numbers of trials after which regrets are compared."""
        return [k for k in CHECKPOINTS if k <= self.length]

    def _regret(
        self, network: Scorer | None, opening: str, settings: Settings | None = None
    ) -> np.ndarray:
        """log10 regret at the checkpoints, shape (B, K)."""
        regret = rollout_regret(
            self.tasks,
            self.length,
            network,
            self.seed,
            opening=OPENINGS[opening],
            settings=settings,
            run=self.run,
        )
        return log_regret(regret)

    def regret(self, network: Scorer) -> np.ndarray:
        """log10 regret of a network at the checkpoints, shape (B, K)."""
        return self._regret(network, "defaults_then_gp")

    def compare(self, network: Scorer) -> dict[str, float]:
        """Metrics of a network.

        ``validation_gain`` (with ``gain_low`` and ``gain_high``, its 95% interval) is over the
        residual policy that it starts from, a mean over tasks and checkpoints; ``gain_at_k``
        after k trials;
        ``regret_GROUP`` the geometric mean of its regret from the third trial on;
        ``lead_GROUP`` over the group's best opponent, likewise.
        """
        mine = self.regret(network)
        start = "surfaces_then_gp" if self.wide else "defaults_then_gp"
        gain = self.opponents[start] - mine
        mean, low, high = bootstrap_interval(gain.mean(1), self.seed)
        metrics = {"validation_gain": mean, "gain_low": low, "gain_high": high}
        for column, k in enumerate(self.checkpoints):
            metrics[f"gain_at_{k}"] = float(gain[:, column].mean())
        for name, rows in self.groups().items():
            later = mine[rows, 1:].mean(0)
            best = np.min([o[rows, 1:].mean(0) for o in self.opponents.values()], axis=0)
            metrics[f"regret_{name}"] = float(10.0 ** later.mean())
            metrics[f"lead_{name}"] = float((best - later).mean())
        return metrics

    def groups(self) -> dict[str, list[int]]:
        """Rows of each group that there is."""
        which = [task.group for task in self.tasks]
        rows = {name: [i for i, group in enumerate(which) if group == name] for name in GROUPS}
        return {name: found for name, found in rows.items() if found}

    def table(self, networks: Mapping[str, Scorer]) -> str:
        """Regret of networks and opponents by group and trial, and paired leads, as Markdown."""
        results = {name: self.regret(network) for name, network in networks.items()}
        results |= self.opponents
        first = next(iter(networks))
        head = " | ".join(str(k) for k in self.checkpoints)
        parts = []
        for group, rows in self.groups().items():
            lines = [f"**{group}** ({len(rows)} tasks), geometric mean of the regret after trials"]
            lines += ["", f"| | {head} |", "|---" * (len(self.checkpoints) + 1) + "|"]
            for name, result in results.items():
                cells = [f"{10.0**value:.3f}" for value in result[rows].mean(0).tolist()]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            for name in [other for other in results if other != first]:
                difference = (results[name] - results[first])[rows]
                cells = [
                    "{:+.2f} [{:+.2f}, {:+.2f}]".format(*bootstrap_interval(column, self.seed))
                    for column in difference.T
                ]
                lines.append(f"| log10 {name} - {first} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"
