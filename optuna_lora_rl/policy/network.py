"""The scorer of candidates and the critic.

Notations
    B, N      tasks and candidates
    F, C      features of a candidate and of a study
    P         privileged features of a task, seen by the critic while training

The scorer looks at every candidate on its own, then at the whole set through its mean and its
maximum (Zaheer et al. 2017, "Deep Sets"), so its answer does not depend on their order or number.
Its last layer starts at zero: untrained, it leaves the residual policy as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.policy.beliefs import CANDIDATE_BELIEFS
from optuna_lora_rl.policy.beliefs import STUDY_BELIEFS
from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.features import CONTEXT_FEATURES

_TRAINED = 40.0
_LOG_TRIALS, _FIRST = CONTEXT_FEATURES.index("log_trials"), CONTEXT_FEATURES.index("first")
# Before the fourth trial a wide network may tell two candidates apart by no more than twice this:
# it is the surfaces that know something then.
_EARLY = 1.5


def sizes(*, wide: bool) -> tuple[int, int]:
    """Numbers of features of a candidate and of a study."""
    more = (len(CANDIDATE_BELIEFS), len(STUDY_BELIEFS)) if wide else (0, 0)
    return len(CANDIDATE_FEATURES) + more[0], len(CONTEXT_FEATURES) + more[1]


@dataclass
class Features:
    """What the network sees of a batch of steps.

    Args:
        values: of the candidates, shape (B, N, F).
        context: of the studies, shape (B, C).
        valid: which candidates count, shape (B, N); at least one in each row.
    """

    values: Tensor
    context: Tensor
    valid: Tensor

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(self.values[rows], self.context[rows], self.valid[rows])


class Scorer(nn.Module):
    """Adds to each candidate's logit what was learnt beyond expected improvement and prior.

    Args:
        width: of the hidden layers.
        bound: largest absolute correction in nats; keeps the policy near its residual start
            on studies unlike the training tasks.
        wide: whether it sees what is known of surfaces, of the run and of costs.
    """

    def __init__(self, width: int = 64, bound: float = 8.0, *, wide: bool = False) -> None:
        super().__init__()
        self.width, self.bound, self.wide = width, bound, wide
        self.embed = nn.Linear(sum(sizes(wide=wide)), width)
        self.mix = nn.Linear(3 * width, width)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Features) -> Tensor:
        """Corrections of the logits, shape (B, N)."""
        h = torch.tanh(_shared(self.embed, features.values, features.context))
        h = h + torch.tanh(_shared(self.mix, h, _pool(h, features.valid)))
        bound = torch.full((len(h), 1), self.bound)
        if self.wide:
            early = features.context[:, _FIRST : _FIRST + 3].sum(1, keepdim=True) > 0
            bound = torch.where(early, _EARLY, bound)
        correction = bound * torch.tanh(self.last(h)[:, :, 0] / bound)
        return correction * _trust(features.context)[:, None]


def _shared(layer: nn.Linear, each: Tensor, all_: Tensor) -> Tensor:
    """A layer over each candidate's values (B, N, a) with the set's (B, b), multiplied once."""
    a = each.shape[-1]
    own = nn.functional.linear(each, layer.weight[:, :a], layer.bias)
    return own + nn.functional.linear(all_, layer.weight[:, a:])[:, None]


def _trust(context: Tensor) -> Tensor:
    """How much of the correction counts, shape (B,).

    All of it for forty trials, and less and less beyond, where training has looked little and
    the policy becomes the Gaussian process that it starts from.
    """
    trials = (3.0 * context[:, _LOG_TRIALS]).exp()
    return (_TRAINED / trials).clamp_max(1.0) ** 2


class Correction(NamedTuple):
    """The scorer as plain arrays: what a single step asks, and what goes to other processes.

    Args:
        embed: weight and bias of the first layer.
        mix: of the second.
        last: of the third.
        bound: largest absolute correction.
        wide: whether it sees what is known of surfaces, of the run and of costs.
    """

    embed: tuple[np.ndarray, np.ndarray]
    mix: tuple[np.ndarray, np.ndarray]
    last: tuple[np.ndarray, np.ndarray]
    bound: float
    wide: bool = False

    @classmethod
    def of(cls, network: Scorer) -> Correction:
        """Of a network, whose memory they share."""
        embed, mix, last = map(_arrays, (network.embed, network.mix, network.last))
        return cls(embed, mix, last, network.bound, network.wide)

    def __call__(self, values: np.ndarray, context: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Corrections of the logits, shape (N,).

        Args:
            values: of the candidates, shape (N, F), single precision.
            context: of the study, shape (C,), single precision.
            valid: which candidates count, shape (N,); at least one.
        """
        embed, mix, last = self.embed, self.mix, self.last
        split = sizes(wide=self.wide)[0]
        h = values @ embed[0][:, :split].T
        h += embed[0][:, split:] @ context + embed[1]
        np.tanh(h, out=h)
        some = h if valid.all() else h[valid]
        pool = np.concatenate([some.mean(0), some.max(0)])
        mixed = h @ mix[0][:, : h.shape[1]].T
        mixed += mix[0][:, h.shape[1] :] @ pool + mix[1]
        np.tanh(mixed, out=mixed)
        h += mixed
        trust = min(_TRAINED / float(np.exp(3.0 * context[_LOG_TRIALS])), 1.0) ** 2
        early = self.wide and context[_FIRST : _FIRST + 3].any()
        bound = _EARLY if early else self.bound
        correction: np.ndarray = bound * trust * np.tanh((h @ last[0][0] + last[1]) / bound)
        return correction


def _arrays(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


class Critic(nn.Module):
    """Value of a study's state; in training it also sees the task's truth (asymmetric).

    Args:
        privileged: number P of features that only training knows.
        width: of the hidden layers.
        wide: whether it sees what is known of surfaces, of the run and of costs.
    """

    def __init__(self, privileged: int, width: int = 64, *, wide: bool = False) -> None:
        super().__init__()
        each, whole = sizes(wide=wide)
        self.embed = nn.Linear(each, width)
        self.body = nn.Sequential(
            nn.Linear(2 * width + whole + privileged, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )

    def forward(self, features: Features, privileged: Tensor) -> Tensor:
        """Expected return from each state, shape (B,)."""
        pooled = _pool(torch.tanh(self.embed(features.values)), features.valid)
        return self.body(torch.cat([pooled, features.context, privileged], -1))[:, 0]


def _pool(h: Tensor, valid: Tensor) -> Tensor:
    """Mean and maximum over the valid candidates, shape (B, 2 width)."""
    mask = valid[:, :, None]
    mean = (h * mask).sum(1) / mask.sum(1).clamp_min(1)
    return torch.cat([mean, torch.where(mask, h, -1.0).amax(1)], -1)
