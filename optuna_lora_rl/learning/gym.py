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

``gymnasium.make_vec("optuna_lora_rl/Tuning-v0", num_envs=64, vectorization_mode=
"vector_entry_point")`` gives the batched form, which is some ten times faster than one by one:
the Gaussian processes of all studies are fitted together. All its episodes end together; the step
after that resets them (``AutoresetMode.NEXT_STEP``).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.features import CONTEXT_FEATURES
from optuna_lora_rl.policy.proposal import Decision

ID = "optuna_lora_rl/Tuning-v0"
Observation = dict[str, np.ndarray]
_LIMIT = 8.0


class _Studies:
    """Studies on some tasks that take their steps together, as arrays.

    Args:
        pool: tasks to draw from.
        trials: a study.
    """

    def __init__(self, pool: Tasks, trials: int) -> None:
        self.pool, self.trials = pool, trials
        self.rows = np.zeros(1, dtype=int)
        self._decision: Decision | None = None
        self.candidates = self.begin(np.zeros(1, dtype=int), 0)["action_mask"].shape[1]

    def begin(self, rows: np.ndarray, seed: int) -> Observation:
        """Start studies on the tasks at rows of the pool."""
        self.rows = rows
        self.environment = TuningEnvironment(
            self.pool[torch.from_numpy(rows)],
            self.trials,
            torch.Generator().manual_seed(seed),
            horizon=torch.full((len(rows),), self.trials),
        )
        return self._observe()

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray]:
        """Run a candidate of each study; what is seen then, and the rewards."""
        with torch.no_grad():
            transition = self.environment.step(torch.from_numpy(actions))
        return self._observe(), transition.reward.double().numpy()

    def _observe(self) -> Observation:
        # After the last trial there is no choice to make; the last candidates are shown again.
        if self._decision is None or not self.environment.done:
            with torch.no_grad():
                self._decision = self.environment.decide(None)
        seen = self._decision.features
        return {
            "candidates": seen.values.numpy().clip(-_LIMIT, _LIMIT),
            "context": seen.context.numpy().clip(-_LIMIT, _LIMIT),
            "action_mask": seen.valid.numpy().astype(np.int8),
        }

    def params(self, study: int) -> dict[str, Any]:
        """The configuration that a study ran last."""
        space = self.pool.spaces[int(self.rows[study])]
        last = self.environment.observe().x[study, -1].numpy()
        return space.decode(last[: len(space)])


def _pool(tasks: Tasks | None, n_tasks: int, task_seed: int, trials: int) -> Tasks:
    for name, value in (("n_tasks", n_tasks), ("trials", trials)):
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    return draw_tasks(n_tasks, task_seed) if tasks is None else tasks


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
        tasks: Tasks | None = None,
        n_tasks: int = 64,
        task_seed: int = 0,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._studies = _Studies(_pool(tasks, n_tasks, task_seed, trials), trials)
        self.action_space = spaces.Discrete(self._studies.candidates)
        self.observation_space = _observation_space(self._studies.candidates)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a study on a random task, or the one of ``options["task"]``."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        row = int(self.np_random.integers(len(self._studies.pool))) if task is None else int(task)
        if not 0 <= row < len(self._studies.pool):
            last = len(self._studies.pool) - 1
            raise UserError(f"task is {row}, but must be between 0 and {last}")
        seen = self._studies.begin(np.array([row]), int(self.np_random.integers(2**62)))
        return self._one(seen), self._info(seen)

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run a candidate."""
        seen, reward = self._studies.step(np.array([int(action)]))
        info = self._info(seen) | {"params": self._studies.params(0)}
        return self._one(seen), float(reward[0]), self._studies.environment.done, False, info

    def _one(self, seen: Observation) -> Observation:
        return {name: array[0] for name, array in seen.items()}

    def _info(self, seen: Observation) -> dict[str, Any]:
        return {
            "action_mask": seen["action_mask"][0],
            "regret": float(self._studies.environment.regret[0]),
            "task": int(self._studies.rows[0]),
        }


class TuningVectorEnv(gymnasium.vector.VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Many studies in step; the same arguments as :class:`TuningEnv`, and how many."""

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own form
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP
    }

    def __init__(
        self,
        num_envs: int = 64,
        trials: int = 20,
        tasks: Tasks | None = None,
        n_tasks: int = 64,
        task_seed: int = 0,
    ) -> None:
        self.num_envs = num_envs
        self._studies = _Studies(_pool(tasks, n_tasks, task_seed, trials), trials)
        n = self._studies.candidates
        self.single_action_space = spaces.Discrete(n)
        self.single_observation_space = _observation_space(n)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a study on a random task in each environment."""
        if seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
        rows = self.np_random.integers(len(self._studies.pool), size=self.num_envs)
        seen = self._studies.begin(rows, int(self.np_random.integers(2**62)))
        return seen, self._infos(seen)

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run a candidate of each; after the last trial, begin new studies instead."""
        never = np.zeros(self.num_envs, dtype=bool)
        if self._studies.environment.done:
            seen, infos = self.reset()
            return seen, np.zeros(self.num_envs), never, never.copy(), infos
        seen, reward = self._studies.step(actions)
        over = np.full(self.num_envs, self._studies.environment.done)
        return seen, reward, over, never, self._infos(seen)

    def _infos(self, seen: Observation) -> dict[str, Any]:
        return {
            "action_mask": seen["action_mask"],
            "regret": self._studies.environment.regret.numpy().copy(),
            "task": self._studies.rows.copy(),
        }


if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="optuna_lora_rl.learning.gym:TuningEnv",
        vector_entry_point="optuna_lora_rl.learning.gym:TuningVectorEnv",
    )
