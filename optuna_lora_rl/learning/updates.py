"""What a policy learns from a rollout: by imitation of a clairvoyant, or by PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_lora_rl.learning.rollouts import Rollout
from optuna_lora_rl.learning.rollouts import log_probabilities
from optuna_lora_rl.policy import ppo
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.ppo import PPOSettings


def imitate(
    network: Scorer,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    settings: PPOSettings,
    generator: torch.Generator,
    *,
    passes: int,
) -> dict[str, float]:
    """Cross-entropy to the clairvoyant, and the critic to the returns seen on the way.

    Args:
        network: the policy.
        critic: its critic.
        optimizer: of both.
        rollout: to learn from.
        settings: of PPO, whose minibatches and returns are used here, too.
        generator: shuffles the transitions.
        passes: over the rollout.
    """
    parameters = [*network.parameters(), *critic.parameters()]
    data = rollout.transitions(settings)
    losses, scale = [], rollout.target.sum(1).mean().clamp_min(1e-6)
    for _ in range(passes):
        order = torch.randperm(len(rollout), generator=generator)
        for rows in order.split(settings.minibatch_size):
            features = rollout.features[rows]
            log_p = log_probabilities(network, features, rollout.residual[rows], 1.0)
            finite = torch.where(features.valid, log_p, torch.zeros_like(log_p))
            imitation = -(rollout.target[rows] / scale * finite).sum(1).mean()
            value = critic(features, rollout.privileged[rows])
            loss = imitation + 0.5 * ((value - data.returns[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(imitation.item())
    return {
        "imitation_loss": sum(losses) / len(losses),
        "explained_variance": ppo.explained_variance(data.values, data.returns),
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
    }


def reinforce(
    network: Scorer,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    settings: PPOSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """One update by PPO; see :func:`imitate`."""

    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        features = rollout.features[rows]
        log_p = log_probabilities(network, features, rollout.residual[rows])
        return log_p, critic(features, rollout.privileged[rows])

    parameters = [*network.parameters(), *critic.parameters()]
    data = rollout.transitions(settings)
    return ppo.update(evaluate, parameters, optimizer, data, settings, generator)
