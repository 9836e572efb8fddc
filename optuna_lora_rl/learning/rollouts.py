"""Episodes on many tasks, kept as flat arrays to learn from.

Notations
    B, T      tasks and trials an episode, M = T * B transitions
    N         candidates a step
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.policy.features import Features
from optuna_lora_rl.policy.network import Critic
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


def select(features: Features, rows: Tensor) -> Features:
    """The features of some transitions."""
    return Features(features.values[rows], features.context[rows], features.valid[rows])


def log_probabilities(
    network: Scorer, features: Features, residual: Tensor, sharpness: float = SHARPNESS
) -> Tensor:
    """Of all candidates under the policy that training draws from, shape (m, N)."""
    return torch.log_softmax(sharpness * (residual + network(features)), -1)


def clairvoyant(tasks: Tasks, x: Tensor, valid: Tensor, regret: Tensor) -> Tensor:
    """The reward that each candidate would earn, shape (B, N), given the regret so far (B,).

    Cross-entropy against it makes the policy proportional to the expected reward of a candidate.
    It must not be normalised by step: that would reward likely improvements, not large ones.
    """
    score, failed = tasks.score(x)
    failed |= tasks.excess(x).nan_to_num(-1.0) > 0
    floor = tasks.floor[:, None]
    found = torch.where(failed, math.inf, (1.0 - score).clamp_min(0.0))
    gain = (regret[:, None] + floor).log() - (torch.minimum(found, regret[:, None]) + floor).log()
    return (gain.clamp_min(0.0) * valid).float()


def _environment(
    tasks: Tasks, length: int, generator: torch.Generator, plain: bool
) -> TuningEnvironment:
    B = len(tasks)
    if plain:
        return TuningEnvironment(tasks, length, generator, horizon=torch.full((B,), length))
    lag = torch.randint(1, 4, (B,), generator=generator)
    lag = lag * (torch.rand(B, generator=generator) < 0.25)
    told = torch.rand(B, generator=generator)
    wrong = torch.randint(3, 60, (B,), generator=generator)
    horizon = torch.where(told < 0.6, length, torch.where(told < 0.7, wrong, 0))
    pruning = torch.rand(B, generator=generator) < 0.2
    return TuningEnvironment(tasks, length, generator, lag=lag, horizon=horizon, pruning=pruning)


def collect(
    tasks: Tasks,
    length: int,
    network: Scorer,
    critic: Critic,
    generator: torch.Generator,
    *,
    plain: bool = False,
) -> Rollout:
    """Run one stochastic episode a task.

    A quarter of the tasks get their results late (parallel workers), a fifth have their poor
    trials pruned; the horizon is told to six in ten, and wrongly to one in ten. With ``plain`` all
    results come at once and whole, and the horizon is told.
    """
    environment = _environment(tasks, length, generator, plain)
    steps: list[tuple[Tensor, ...]] = []
    seen: list[Features] = []
    with torch.no_grad():
        while not environment.done:
            decision = environment.decide(None)
            features, residual = decision.features, decision.residual.float()
            logprob = log_probabilities(network, features, residual)
            action = torch.multinomial(logprob.exp(), 1, generator=generator)
            privileged = environment.privileged()
            value = critic(features, privileged)
            x, valid = decision.candidates.x, decision.candidates.valid
            target = clairvoyant(tasks, x, valid, environment.regret)
            if not environment.steps:  # the first trial is the default, there is no choice
                target = torch.zeros_like(target)
            reward = environment.step(action[:, 0]).reward
            chosen = logprob.gather(1, action)[:, 0]
            seen.append(features)
            steps.append((residual, target, privileged, action[:, 0], chosen, value, reward))
    columns = list(zip(*steps, strict=True))
    residuals, targets, privileges = (torch.cat(column) for column in columns[:3])
    actions, logprobs, values, rewards = (torch.stack(column) for column in columns[3:])
    joined = Features(
        torch.cat([f.values for f in seen]),
        torch.cat([f.context for f in seen]),
        torch.cat([f.valid for f in seen]),
    )
    return Rollout(
        joined,
        residuals,
        targets,
        privileges,
        actions,
        logprobs,
        values,
        rewards,
        environment.regret,
    )
