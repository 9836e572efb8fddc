"""In-study learning: the policy's weights as a function of the study's history.

After fixed numbers of finished trials the study's own rewards update the policy
(:mod:`optuna_lora_rl.policy.adaptation`). Nothing is kept that could get lost: whoever has the
trials rebuilds each step (its candidates come from seed, trial number and names) and comes to the
same weights, after a resume or in another worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_lora_rl.policy.adaptation import Step
from optuna_lora_rl.policy.adaptation import adapt
from optuna_lora_rl.policy.adaptation import rewards
from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.samplers.memory import Memo

if TYPE_CHECKING:
    from optuna_lora_rl.policy.decision import Decision
    from optuna_lora_rl.policy.dimensions import Space
    from optuna_lora_rl.policy.network import Scorer
    from optuna_lora_rl.samplers.history import History

# Numbers of finished trials after which the policy learns; later its correction hardly counts.
AFTER = (8, 16, 32, 64)
_KEPT = 8
_SAME = 1e-6

# Makes the decision before a trial once more: from the trials that ended before it, its turn,
# and points (k, d) that are to be among the candidates.
Rebuild = Callable[["History", int, np.ndarray], "Decision"]


class Adaptation:
    """The policy of a study that learns from itself.

    Args:
        network: the policy at the start.
        seed: of the candidates and of the updates.
    """

    def __init__(self, network: Scorer, seed: int) -> None:
        self.seed = seed
        self._start = network
        self._known: Memo[Scorer] = Memo(_KEPT)

    def network(self, space: Space, history: History, rebuild: Rebuild) -> Scorer:
        """The policy after a history.

        Args:
            space: of the study.
            history: all its trials; running ones are left out, and of the others the first ones,
                by number, are learnt from.
            rebuild: makes the decision before a trial once more.
        """
        finished = history.select(~history.running)
        network, begin = self._start, 0
        for count in AFTER:
            if len(finished) < count:
                break
            told = finished.select(np.arange(count))
            learn = partial(self._learn, network, told, begin, rebuild)
            network, begin = self._known.get(_digest(space, told), learn), count
        return network

    def _learn(self, network: Scorer, told: History, begin: int, rebuild: Rebuild) -> Scorer:
        gains = rewards(_scores(told), told.scored)
        # The first trial had no choice.
        rows = range(max(begin, 1), len(told))
        steps = [_step(told, row, float(gains[row]), rebuild) for row in rows]
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        return adapt(network, [step for step in steps if step is not None], generator)


def _step(told: History, row: int, reward: float, rebuild: Rebuild) -> Step | None:
    """A trial as a step; ``None`` for what the policy could not have chosen (a repeat)."""
    before, turn = told.select(np.arange(row)), int(told.turns[row])
    point = told.points[row]
    decision = rebuild(before, turn, point[:0].reshape(0, len(point)))
    action = _find(decision, point)
    if action is None:  # enqueued, added, or proposed with another seed
        decision = rebuild(before, turn, point[None])
        action = _find(decision, point)
    if action is None:
        return None
    share = 1.0 - decision.trust
    return Step(decision.values, decision.context, decision.residual, share, action, reward)


def _find(decision: Decision, point: np.ndarray) -> int | None:
    """The allowed candidate at a point; absent parameters may be anything there."""
    gap = np.where(np.isnan(point), 0.0, np.abs(decision.x - point)).max(1)
    same = np.flatnonzero((gap < _SAME) & np.isfinite(decision.residual))
    return int(same[0]) if len(same) else None


def _scores(told: History) -> np.ndarray:
    """One score a trial, objectives weighed evenly, shape (n,)."""
    scores, m = np.zeros(len(told)), told.scores.shape[1]
    good = told.scored
    if m == 1:
        scores[good] = told.scores[good, 0]
    else:
        scores[good] = scalarise(told.scores[good], np.full(m, 1.0 / m))
    return scores


def _digest(space: Space, told: History) -> bytes:
    content = hashlib.sha256(repr(space).encode())
    for array in (told.turns, told.points, told.scores, told.failed, told.constraints):
        content.update(np.ascontiguousarray(array).tobytes())
    return content.digest()
