"""The scorer of candidates; the twin of :class:`~optuna_lora_rl.policy.network.Scorer`."""

from __future__ import annotations

import numpy as np
import torch

from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.features import CONTEXT_FEATURES
from optuna_lora_rl.policy.network import TRAINED
from optuna_lora_rl.policy.network import Scorer

_SPLIT = len(CANDIDATE_FEATURES)
_LOG_TRIALS = CONTEXT_FEATURES.index("log_trials")


def score(
    network: Scorer, values: np.ndarray, context: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Corrections of the logits, shape (N,).

    Args:
        network: the weights.
        values: of the candidates, shape (N, F), single precision.
        context: of the study, shape (C,), single precision.
        valid: which candidates count, shape (N,); at least one.
    """
    width, bound = network.width, network.bound
    embed, mix, last = (_arrays(layer) for layer in (network.embed, network.mix, network.last))
    h = values @ embed[0][:, :_SPLIT].T
    h += embed[0][:, _SPLIT:] @ context + embed[1]
    np.tanh(h, out=h)
    some = h if valid.all() else h[valid]
    pool = np.concatenate([some.mean(0), some.max(0)])
    mixed = h @ mix[0][:, :width].T
    mixed += mix[0][:, width:] @ pool + mix[1]
    np.tanh(mixed, out=mixed)
    h += mixed
    trust = min(TRAINED / float(np.exp(3.0 * context[_LOG_TRIALS])), 1.0) ** 2
    correction: np.ndarray = bound * trust * np.tanh((h @ last[0][0] + last[1]) / bound)
    return correction


def _arrays(layer: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()
