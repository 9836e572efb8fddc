"""Proximal policy optimisation for any actor over a set of candidates.

The update knows nothing of tuning: it takes a function that gives log-probabilities, entropies
and values for a minibatch, and flat arrays of what was done.

Notations (cleanrl's names)
    T, B          steps and environments of a rollout, M = T * B transitions
    logprob       of the action taken, under the policy that took it, shape (M,)
    logratio      newlogprob - logprob;  ratio = exp(logratio)
    advantages    generalised advantage estimates, returns = advantages + values

Checked on an environment that others know: ``studies/cartpole.py`` trains on CartPole-v1 with this
update and the hyperparameters of cleanrl's ``ppo.py``.

Metrics that an update returns
    policy_loss       clipped surrogate objective, negated, mean over minibatches
    value_loss        half the mean squared error of the values against the returns
    entropy           of the policy over its candidates, in nats
    approx_kl         mean of (ratio - 1) - logratio, Schulman's low-variance estimate of
                      KL(old, new); beyond about 0.02 the steps are too large
    clipfrac          share of transitions whose ratio left [1 - clip, 1 + clip]
    explained_variance 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one
                      that predicts the mean, below 0 for one that misleads
    grad_norm         of the gradient before clipping
    learning_rate     of the optimiser at this update

Metrics that the training run adds (``learning.training``)
    reward            sum over a study's trials, mean over the rollout's studies: how far the log
                      regret fell
    regret            after the last trial, mean over the studies; ``length`` trials each
    imitation_loss    cross-entropy to what each candidate would have earned, weighted by it
    validation_gain   log10 regret of the start less that of the network on validation tasks
    lead_GROUP        the same against the best of three opponents in a group of tasks
    regret_GROUP      geometric mean of the network's regret there, from the third trial on

Implementation details (numbers of Huang et al. 2022, "The 37 Implementation Details of PPO")
    1  vectorised environments                    2  orthogonal initialisation: not used; the
    3  Adam's epsilon 1e-5                           scorer must start at zero (residual policy)
    4  learning-rate annealing                    5  GAE (Schulman et al. 2016, eq. 16)
    6  minibatches over shuffled transitions      7  advantage normalisation by minibatch
    8  clipped surrogate (Schulman et al. 2017, eq. 7)
    9  value-loss clipping: a setting. Off for tuning (Andrychowicz et al. 2021 find that it
       hurts), on for CartPole, as the reference has it
    10 entropy bonus                              11 global gradient clipping
    12 debug variables (the metrics above)        13 separate networks for policy and value
    Of the nine details for continuous actions and the five for Atari none applies; of the others:
    invalid candidates get the logit -inf (Huang & Ontañón 2022, "A closer look at invalid action
    masking"), and an update stops early beyond ``target_kl`` (Dossa et al. 2021).

The critic sees the task's truth while training (asymmetric actor-critic, Pinto et al. 2018).
Episodes end with the rollout, so nothing is bootstrapped beyond it; with ``dones`` and
``last_value`` the estimates also serve rollouts that cut episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn


@dataclass(frozen=True)
class PPOSettings:
    """Hyperparameters; the defaults are those of MetaBO (Volpp et al. 2020) where it has them.

    Args:
        learning_rate: of Adam at the first update.
        gamma: discount of a step's reward.
        gae_lambda: trade of bias for variance in the advantages.
        clip_coef: largest change of the ratio that is rewarded.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: of actor and critic together.
        update_epochs: passes over a rollout.
        minibatch_size: transitions a gradient step.
        target_kl: stop the passes of an update beyond this ``approx_kl``.
        clip_vloss: let no value move further than ``clip_coef`` in an update (Huang et al. 2022,
            detail 9).
    """

    learning_rate: float = 4e-4
    gamma: float = 0.98
    gae_lambda: float = 0.98
    clip_coef: float = 0.15
    ent_coef: float = 0.001
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    update_epochs: int = 4
    minibatch_size: int = 256
    target_kl: float = 0.03
    clip_vloss: bool = False


@dataclass
class Transitions:
    """Flat arrays of a rollout, each of shape (M,); see the module's notations."""

    actions: Tensor
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


# Maps indices of transitions, shape (m,), to log-probabilities of all candidates, shape (m, N),
# and values, shape (m,), under the parameters being trained.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def generalised_advantages(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_value: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16), shape (T, B).

    Args:
        rewards: of each step, shape (T, B).
        values: of the state before each step, shape (T, B).
        dones: whether the episode ended with the step, shape (T, B).
        last_value: of the state after the last step, shape (B,).
        gamma: discount.
        gae_lambda: decay of the estimates.
    """
    advantages = torch.zeros_like(rewards)
    next_value, following = last_value, torch.zeros_like(last_value)
    for t in reversed(range(len(rewards))):
        alive = 1.0 - dones[t].to(rewards.dtype)
        delta = rewards[t] + gamma * next_value * alive - values[t]
        following = delta + gamma * gae_lambda * alive * following
        advantages[t], next_value = following, values[t]
    return advantages


def clipped_loss(
    newlogprob: Tensor, logprob: Tensor, advantages: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate loss (Schulman et al. 2017, eq. 7), approx_kl and clipfrac."""
    logratio = newlogprob - logprob
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    with torch.no_grad():
        approx_kl = ((ratio - 1.0) - logratio).mean()
        clipfrac = ((ratio - 1.0).abs() > clip_coef).float().mean()
    return torch.maximum(unclipped, clipped).mean(), approx_kl, clipfrac


def masked_entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy over candidates, impossible ones (-inf) left out, shape (m,)."""
    p = log_probabilities.exp()
    return -(p * torch.where(p > 0, log_probabilities, torch.zeros_like(p))).sum(-1)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); NaN for constant returns."""
    variance = returns.var()
    return float(1.0 - (returns - values).var() / variance) if variance > 0 else float("nan")


def _value_loss(
    newvalue: Tensor, data: Transitions, rows: Tensor, settings: PPOSettings
) -> Tensor:
    loss = (newvalue - data.returns[rows]) ** 2
    if settings.clip_vloss:
        old, reach = data.values[rows], settings.clip_coef
        moved = old + (newvalue - old).clamp(-reach, reach)
        loss = torch.maximum(loss, (moved - data.returns[rows]) ** 2)
    return 0.5 * loss.mean()


def update(
    evaluate: Evaluate,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    data: Transitions,
    settings: PPOSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """One PPO update from one rollout.

    Args:
        evaluate: log-probabilities and values of transitions under the current parameters.
        parameters: that ``optimizer`` trains.
        optimizer: Adam; its learning rate is annealed by the caller.
        data: the rollout.
        settings: hyperparameters.
        generator: shuffles the transitions.

    Returns:
        the metrics of the module's glossary.
    """
    trained = list(parameters)
    M, size = len(data.actions), settings.minibatch_size
    history: dict[str, list[float]] = {}
    for _ in range(settings.update_epochs):
        order = torch.randperm(M, generator=generator)
        for rows in order.split(size):
            if len(rows) < 2:
                continue
            advantages = data.advantages[rows]
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            log_probabilities, newvalue = evaluate(rows)
            newlogprob = log_probabilities.gather(1, data.actions[rows][:, None])[:, 0]
            policy_loss, approx_kl, clipfrac = clipped_loss(
                newlogprob, data.logprobs[rows], advantages, settings.clip_coef
            )
            value_loss = _value_loss(newvalue, data, rows, settings)
            entropy = masked_entropy(log_probabilities).mean()
            loss = policy_loss - settings.ent_coef * entropy + settings.vf_coef * value_loss
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            metrics = {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": entropy,
                "approx_kl": approx_kl,
                "clipfrac": clipfrac,
                "grad_norm": grad_norm,
            }
            for name, value in metrics.items():
                history.setdefault(name, []).append(value.item())
        epoch = history["approx_kl"][-max(1, M // size) :]
        if sum(epoch) / len(epoch) > settings.target_kl:
            break
    means = {name: sum(values) / len(values) for name, values in history.items()}
    means["explained_variance"] = explained_variance(data.values, data.returns)
    means["learning_rate"] = float(optimizer.param_groups[0]["lr"])
    return means
