"""The tuning environment in Gymnasium's form, so that other libraries can train on it.

    import gymnasium
    import optuna_lora_rl.learning.gym  # registers the environment

    env = gymnasium.make("optuna_lora_rl/Tuning-v0", trials=20)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(info["action_mask"].argmax())

An episode is a study of ``trials`` trials on one task; each reset draws another task of the pool
(``options={"task": 3}`` asks for that one).

Observation (a dictionary; N candidates, F and C features, see ``policy.features``)
    candidates    features of each candidate, float32, shape (N, F), within [-8, 8]
    context       features of the study so far, float32, shape (C,), within [-8, 8]
    action_mask   1 where a candidate may be tried, int8, shape (N,)

Action: the index of the candidate to run, 0 to N - 1. A masked candidate (a repeat, mostly) is run
as well; it costs a trial and seldom earns anything. The order of the candidates means nothing but
the source, which is among the features.

Reward: the decrease of log(regret + floor) by this trial, at least 0; the rewards of an episode
add up to log(3 + floor) - log(last regret + floor). The floor lies near the task's noise, so that
nothing is paid for differences that no study could see. Regret is 0 at the best known
configuration and 1 at the median one.

Info: ``action_mask`` again, ``regret`` so far, ``task`` (its number in the pool), and after a
step ``params``, the configuration that was run.

``gymnasium.make_vec("optuna_lora_rl/Tuning-v0", num_envs=4, vectorization_mode="async")`` runs
studies side by side, each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.features import CONTEXT_FEATURES

ID = "optuna_lora_rl/Tuning-v0"
Observation = dict[str, np.ndarray]
_LIMIT = 8.0


def _observation_space(candidates: int) -> spaces.Dict:
    def box(*shape: int) -> spaces.Box:
        return spaces.Box(-_LIMIT, _LIMIT, shape, np.float32)

    return spaces.Dict(
        {
            "candidates": box(candidates, len(CANDIDATE_FEATURES)),
            "context": box(len(CONTEXT_FEATURES)),
            "action_mask": spaces.Box(0, 1, (candidates,), np.int8),
        }
    )


class TuningEnv(gymnasium.Env[Observation, np.int64]):
    """One study at a time; see the module's notes for observation, action and reward.

    Args:
        trials: an episode.
        tasks: the pool of tasks; by default random synthetic ones.
        n_tasks: how many of these.
        task_seed: their seed.

    Raises:
        UserError: ``trials`` or ``n_tasks`` is below 1.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        trials: int = 20,
        tasks: Sequence[Task] | None = None,
        n_tasks: int = 64,
        task_seed: int = 0,
        render_mode: str | None = None,
    ) -> None:
        for name, value in (("n_tasks", n_tasks), ("trials", trials)):
            if value < 1:
                raise UserError(f"{name} is {value}, but must be at least 1")
        self.render_mode = render_mode
        self._pool = draw_tasks(n_tasks, task_seed) if tasks is None else tasks
        self._trials, self._task = trials, 0
        candidates = len(self._begin(0, 0)["action_mask"])
        self.action_space = spaces.Discrete(candidates)
        self.observation_space = _observation_space(candidates)

    def _begin(self, task: int, seed: int) -> Observation:
        self._task = task
        self._study = TuningEnvironment(
            self._pool[task],
            self._trials,
            torch.Generator().manual_seed(seed),
            horizon=self._trials,
        )
        self._decision = self._study.decide(None)
        return self._seen()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a study on a random task, or the one of ``options["task"]``."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        row = int(self.np_random.integers(len(self._pool))) if task is None else int(task)
        if not 0 <= row < len(self._pool):
            raise UserError(f"task is {row}, but must be between 0 and {len(self._pool) - 1}")
        return self._begin(row, int(self.np_random.integers(2**62))), self._info()

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run a candidate."""
        params = self._pool[self._task].space.decode(self._decision.x[action])
        reward = self._study.step(int(action))
        # After the last trial there is no choice to make; the last candidates are shown again.
        if not self._study.done:
            self._decision = self._study.decide(None)
        return self._seen(), reward, self._study.done, False, self._info() | {"params": params}

    def _seen(self) -> Observation:
        seen = self._decision
        return {
            "candidates": seen.values.clip(-_LIMIT, _LIMIT),
            "context": seen.context.clip(-_LIMIT, _LIMIT),
            "action_mask": seen.valid.astype(np.int8),
        }

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self._decision.valid.astype(np.int8),
            "regret": self._study.regret,
            "task": self._task,
        }


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point="optuna_lora_rl.learning.gym:TuningEnv")
