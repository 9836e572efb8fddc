"""Episodes on many tasks, kept as flat arrays to learn from.

Notations
    B, T      tasks and trials an episode, M = T * B transitions
    N         candidates a step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.learning.environment import Map
from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.environment import settings_of
from optuna_lora_rl.learning.environment import sweep_opening
from optuna_lora_rl.learning.lookahead import FIRST
from optuna_lora_rl.learning.lookahead import LAST
from optuna_lora_rl.learning.lookahead import lookahead
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Features
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.ppo import PPOSettings
from optuna_lora_rl.policy.ppo import Transitions
from optuna_lora_rl.policy.ppo import generalised_advantages

# At work the candidate with the best logit is taken; PPO draws from softmax(SHARPNESS * logits),
# which is nearly as greedy. Imitation takes the logits as they are: log expected improvement is
# an estimate of the log expected reward, which is what it corrects.
SHARPNESS = 6.0


@dataclass
class Rollout:
    """What happened in a batch of episodes.

    Args:
        features: of every step, each tensor's first axis M.
        residual: logits without the network, shape (M, N).
        target: the reward that each candidate would have earned, shape (M, N).
        privileged: the critic's view of the truth, shape (M, P).
        actions: chosen candidates, shape (T, B).
        logprobs: of the actions, shape (T, B).
        values: the critic's, shape (T, B).
        rewards: shape (T, B).
        regret: after the last trial, shape (B,).
    """

    features: Features
    residual: Tensor
    target: Tensor
    privileged: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    regret: Tensor

    def __len__(self) -> int:
        return len(self.residual)

    def transitions(self, settings: PPOSettings) -> Transitions:
        """Flat arrays with advantages and returns; episodes end with the rollout."""
        dones = torch.zeros_like(self.rewards, dtype=torch.bool)
        dones[-1] = True
        advantages = generalised_advantages(
            self.rewards,
            self.values,
            dones,
            torch.zeros_like(self.values[0]),
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
        )
        flat = (self.actions, self.logprobs, advantages, advantages + self.values, self.values)
        return Transitions(*(array.flatten() for array in flat))


def log_probabilities(
    network: Scorer, features: Features, residual: Tensor, sharpness: float = SHARPNESS
) -> Tensor:
    """Of all candidates under the policy that training draws from, shape (m, N)."""
    return torch.log_softmax(sharpness * (residual + network(features)), -1)


def clairvoyant(task: Task, decision: Decision, regret: float) -> np.ndarray:
    """The reward that each candidate would earn, shape (N,), given the regret so far.

    Cross-entropy against it makes the policy proportional to the expected reward of a candidate.
    It must not be normalised by step: that would reward likely improvements, not large ones.
    """
    score, failed = task.score(decision.x)
    failed = failed | (task.excess(decision.x) > 0)
    found = np.where(failed, regret, np.minimum(np.maximum(1.0 - score, 0.0), regret))
    gain = math.log(regret + task.floor) - np.log(found + task.floor)
    return np.where(decision.valid, gain, 0.0).astype(np.float32)


# The steps of one study, arrays with a first axis T: values, context, valid, residual, target,
# privileged, actions and rewards; and the regret after the last.
_Episode = tuple[list[np.ndarray], float]


@dataclass(frozen=True)
class Teaching:
    """How episodes are begun, rewarded and turned into targets.

    Args:
        opened: share of the studies that begin with up to three trials of somebody else: the
            guides' configuration, a sweep, random ones, or good ones that are known from earlier.
        linear: weight of the decrease of the regret itself in the reward of the first five trials.
        lookahead: weight of what the surfaces say two trials ahead in the targets of trials two
            to five; the rest is what a clairvoyant knows.
    """

    opened: float = 0.0
    linear: float = 0.0
    lookahead: float = 0.0


PLAIN = Teaching()
_OPENED = 3


def _environment(
    task: Task, length: int, generator: torch.Generator, plain: bool, rest: dict[str, Any]
) -> TuningEnvironment:
    if plain:
        return TuningEnvironment(task, length, generator, horizon=length, **rest)
    late, told, pruned = torch.rand(3, generator=generator).tolist()
    lag = int(torch.randint(1, 4, (1,), generator=generator))
    wrong = int(torch.randint(3, 60, (1,), generator=generator))
    return TuningEnvironment(
        task,
        length,
        generator,
        lag=lag if late < 0.25 else 0,
        horizon=length if told < 0.6 else wrong if told < 0.7 else 0,
        pruning=pruned < 0.2,
        **rest,
    )


def _open(environment: TuningEnvironment, count: int) -> None:
    """Run so many trials of somebody else."""
    task, generator = environment.task, environment.generator
    kind = float(torch.rand(1, generator=generator))
    for _ in range(count):
        x = None
        if kind < 0.35:
            x = sweep_opening(environment)
        elif kind < 0.55:
            x = task.layout.default if not environment.steps else None
        elif kind < 0.75:  # what was good elsewhere is good here, too, or nearly
            drawn = task.space.snap(uniform_points(16, len(task.space), generator))
            score, failed = task.score(drawn)
            x = drawn[np.where(failed, -np.inf, score).argmax()]
        if x is None:
            x = task.space.snap(uniform_points(1, len(task.space), generator)[0])
        environment.run(x)


def _study(
    job: tuple[Task, int],
    *,
    length: int,
    network: Correction,
    plain: bool,
    settings: Settings,
    teaching: Teaching,
) -> _Episode:
    task, seed = job
    generator = torch.Generator().manual_seed(seed)
    opened = 0
    if teaching.opened and float(torch.rand(1, generator=generator)) < teaching.opened:
        opened = int(torch.randint(1, _OPENED + 1, (1,), generator=generator))
    rest = {"settings": settings, "linear": teaching.linear}
    environment = _environment(task, length + opened, generator, plain, rest)
    if opened:
        _open(environment, opened)
    steps = []
    while not environment.done:
        decision = environment.decide(network)
        residual, privileged = decision.residual.astype(np.float32), environment.privileged()
        target = clairvoyant(task, decision, environment.regret)
        if not environment.steps:  # the first trial is the default, there is no choice
            target = np.zeros_like(target)
        elif teaching.lookahead and FIRST <= environment.steps < LAST:
            ahead = lookahead(decision, task.floor)
            if ahead is not None:
                target = teaching.lookahead * ahead + (1.0 - teaching.lookahead) * target
        p = torch.softmax(SHARPNESS * torch.from_numpy(decision.logits), 0)
        action = int(torch.multinomial(p, 1, generator=generator))
        reward = np.float32(environment.step(action))
        seen = (decision.values, decision.context, decision.valid)
        steps.append((*seen, residual, target, privileged, np.int64(action), reward))
    return [np.stack(column) for column in zip(*steps, strict=True)], environment.regret


def collect(
    tasks: Sequence[Task],
    length: int,
    network: Scorer,
    critic: Critic,
    generator: torch.Generator,
    *,
    plain: bool = False,
    teaching: Teaching = PLAIN,
    run: Map = map,
) -> Rollout:
    """Run one stochastic episode a task.

    A quarter of the tasks get their results late (parallel workers), a fifth have their poor
    trials pruned; the horizon is told to six in ten, and wrongly to one in ten. With ``plain`` all
    results come at once and whole, and the horizon is told.

    Args:
        tasks: the problems.
        length: trials a study.
        network: the policy.
        critic: its critic.
        generator: gives each study a seed of its own.
        plain: see above.
        teaching: how episodes are begun, rewarded and learnt from.
        run: applies a function to jobs.
    """
    study = partial(
        _study,
        length=length,
        network=Correction.of(network),
        plain=plain,
        settings=settings_of(network),
        teaching=teaching,
    )
    seeds = torch.randint(2**62, (len(tasks),), generator=generator).tolist()
    episodes = run(study, list(zip(tasks, seeds, strict=True)))
    studies, regrets = zip(*episodes, strict=True)
    columns = [np.stack(column, 1) for column in zip(*studies, strict=True)]
    *seen, actions, rewards = map(torch.from_numpy, columns)
    flat = [column.flatten(0, 1) for column in seen]
    features, (residual, target, privileged) = Features(*flat[:3]), flat[3:]
    with torch.no_grad():
        log_p = log_probabilities(network, features, residual)
        logprobs = log_p.gather(1, actions.flatten()[:, None]).view_as(actions)
        values = critic(features, privileged).view_as(rewards)
    return Rollout(
        features,
        residual,
        target,
        privileged,
        actions,
        logprobs,
        values,
        rewards,
        torch.tensor(regrets),
    )
