"""Learning within one study: small PPO updates of the scorer's last layer.

Notations
    T         steps (finished trials of the study that had a choice), N candidates a step
    regret    of the best trial so far, as far as the study knows it: 0 at the best trial of all
              those given, 1 at the median one
    reward    decrease of log(regret + FLOOR) by a trial

One study is little to learn from, so that every update is bounded three times: PPO's clipped
ratio, a bound on the norm of the change, and a bound on the mean KL divergence between the policy
before and after over the steps that it learnt from. The rest of the network stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy import ppo
from optuna_lora_rl.policy.network import Features
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.ppo import PPOSettings
from optuna_lora_rl.policy.ppo import Transitions
from optuna_lora_rl.policy.ppo import generalised_advantages

# The policy that acts greedily is taken for softmax(SHARPNESS * logits), as in training.
SHARPNESS = 6.0
FLOOR = 0.05
_WORST = 3.0
MAX_KL = 0.05
# Largest change of the last layer, relative to its norm.
MAX_CHANGE = 0.1
SETTINGS = PPOSettings(
    learning_rate=2e-3, ent_coef=0.0, vf_coef=0.0, update_epochs=8, minibatch_size=64
)


@dataclass
class Step:
    """One finished trial as the policy saw it before.

    Args:
        values: the network's input for each candidate, shape (N, F).
        context: its input of the study, shape (C,).
        residual: logits without the network, shape (N,); -inf where not allowed.
        share: of the network's correction that counted, 0 to 1.
        action: the candidate that was tried.
        reward: what it brought.
    """

    values: np.ndarray
    context: np.ndarray
    residual: np.ndarray
    share: float
    action: int
    reward: float


def rewards(scores: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The decrease of the log regret by each trial, shape (n,).

    Args:
        scores: larger is better, shape (n,), in the order of the trials.
        good: trials with a score of their own, shape (n,).
    """
    if not good.any():
        return np.zeros(len(scores))
    scores = np.clip(scores, -1e300, 1e300)
    best, median = scores[good].max(), np.median(scores[good])
    span = best - median if best > median else 1.0
    found = np.where(good, np.clip((best - scores) / span, 0.0, _WORST), _WORST)
    logs = np.log(np.minimum.accumulate(found) + FLOOR)
    return -np.diff(logs, prepend=np.log(_WORST + FLOOR))


# The objective's program may have switched gradients off, or be in inference mode, whose tensors
# cannot be learnt from: then network and steps are copied out of it.
@torch.inference_mode(False)
@torch.enable_grad()
def adapt(network: Scorer, steps: Sequence[Step], generator: torch.Generator) -> Scorer:
    """The network after one update from consecutive steps of a study.

    Args:
        network: the policy that proposed them, or is taken to have; it is left as it is.
        steps: in the order of the trials.
        generator: shuffles them.
    """
    new = copy.deepcopy(network)
    if len(steps) < 2 or all(step.reward == steps[0].reward for step in steps):
        return new
    features, residual, share = _stack(steps)
    trained = list(new.last.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)

    def log_probabilities(rows: Tensor) -> Tensor:
        correction = share[rows, None] * new(features[rows])
        return torch.log_softmax(SHARPNESS * (residual[rows] + correction), -1)

    everything = torch.arange(len(steps))
    with torch.no_grad():
        before = log_probabilities(everything)
    data = _transitions(steps, before)
    with torch.random.fork_rng(devices=[]):
        ppo.update(
            lambda rows: (log_probabilities(rows), data.values[rows]),
            trained,
            torch.optim.Adam(trained, lr=SETTINGS.learning_rate, eps=1e-5),
            data,
            SETTINGS,
            generator,
        )
    with torch.no_grad():
        _bound(network, new)
        while _divergence(before, log_probabilities(everything)) > MAX_KL:
            for old, parameter in zip(network.last.parameters(), trained, strict=True):
                parameter.copy_(old + 0.5 * (parameter - old))
    return new.eval().requires_grad_(False)


def _stack(steps: Sequence[Step]) -> tuple[Features, Tensor, Tensor]:
    """All steps in one batch, padded to the most candidates."""
    counts = [len(step.residual) for step in steps]
    each = np.zeros((len(steps), max(counts), steps[0].values.shape[1]), dtype=np.float32)
    residual = np.full(each.shape[:2], -np.inf, dtype=np.float32)
    for row, (step, count) in enumerate(zip(steps, counts, strict=True)):
        each[row, :count], residual[row, :count] = step.values, step.residual
    context = np.stack([step.context for step in steps])
    # What is not allowed has no logit.
    arrays = (each, context, np.isfinite(residual), residual)
    values, whole, valid, logits = (torch.from_numpy(array) for array in arrays)
    share = torch.tensor([step.share for step in steps], dtype=torch.float32)
    return Features(values, whole, valid), logits, share


def _transitions(steps: Sequence[Step], before: Tensor) -> Transitions:
    """Advantages over a line in the log of time, since later trials gain less whoever chooses."""
    actions = torch.tensor([step.action for step in steps])
    reward = torch.tensor([step.reward for step in steps], dtype=torch.float32)
    T = len(steps)
    returns = torch.zeros_like(reward)
    following = 0.0
    for t in reversed(range(T)):
        following = float(reward[t]) + SETTINGS.gamma * following
        returns[t] = following
    time = torch.arange(1, T + 1, dtype=torch.float32).log()
    time = torch.stack([torch.ones_like(time), time], 1)
    values = time @ torch.linalg.lstsq(time, returns[:, None]).solution
    dones = torch.zeros((T, 1), dtype=torch.bool)
    dones[-1] = True
    advantages = generalised_advantages(
        reward[:, None],
        values,
        dones,
        torch.zeros_like(reward[:1]),
        gamma=SETTINGS.gamma,
        gae_lambda=SETTINGS.gae_lambda,
    )[:, 0]
    logprobs = before.gather(1, actions[:, None])[:, 0]
    return Transitions(actions, logprobs, advantages, advantages + values[:, 0], values[:, 0])


def _bound(old: Scorer, new: Scorer) -> None:
    """Shorten the change of the last layer to ``MAX_CHANGE`` of its norm."""
    pairs = list(zip(old.last.parameters(), new.last.parameters(), strict=True))
    norm = sum(float(p.square().sum()) for p, _ in pairs) ** 0.5
    change = sum(float((q - p).square().sum()) for p, q in pairs) ** 0.5
    # A network that starts at zero may still begin to move.
    most = MAX_CHANGE * max(norm, 1.0)
    if change > most:
        for p, q in pairs:
            q.copy_(p + (most / change) * (q - p))


def _divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL divergence of the policy after from the policy before, in nats."""
    p = before.exp()
    gap = torch.where(p > 0, before - after, torch.zeros_like(p))
    return float((p * gap).sum(-1).mean())
