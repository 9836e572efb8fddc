"""What a candidate is worth two trials ahead, by what the trials leave of the surfaces.

Notations
    N, P      candidates and pairs of a surface and a span, equally likely
    levels    by how much each pair expects a candidate to beat the incumbent, in spans, (N, P)
    R         regret of the incumbent by pair, in spans, (P,)

A candidate is tried under one pair at a time, whose outcome weighs the pairs anew; then the
candidate with the highest mean is tried. The mean of log regret that both take away is the
candidate's worth: of trials that teach as well as of those that win.
"""

from __future__ import annotations

import numpy as np

from optuna_lora_rl.policy.decision import Decision

# Candidates that are looked at, and outcomes of each.
_LOOKED_AT, _OUTCOMES = 20, 24
# Deviation of an outcome round what a pair expects, in its spans.
_DOUBT = 0.2
# Nats of worth that make a candidate e times as likely.
_SHARPNESS = 0.08
# Trials, running ones included, after which a study is looked ahead from.
FIRST, LAST = 1, 5


def lookahead(decision: Decision, floor: float) -> np.ndarray | None:
    """A target for imitation, of the size of a reward, shape (N,); ``None`` without surfaces.

    Args:
        decision: before the step, with features of surfaces.
        floor: regret that is as good as none.
    """
    surfaces, levels = decision.surfaces, decision.view.levels
    if surfaces is None or not levels.shape[1]:
        return None
    looked = np.argsort(-decision.residual, kind="stable")[:_LOOKED_AT]
    looked = looked[decision.valid[looked]]
    reachable = np.flatnonzero(decision.valid)
    L = levels[reachable]
    R = np.maximum(L.max(0), 0.0)
    pairs = np.linspace(0, levels.shape[1] - 1, _OUTCOMES).astype(int)
    worth = np.array([_worth(levels[i], L, R, surfaces.spans, pairs, floor) for i in looked])
    likely = np.exp((worth - worth.max()) / _SHARPNESS)
    target = np.zeros(len(levels), dtype=np.float32)
    target[looked] = max(float(worth.max()), 0.0) * likely / likely.sum()
    return target


def _worth(
    own: np.ndarray,
    L: np.ndarray,
    R: np.ndarray,
    spans: np.ndarray,
    pairs: np.ndarray,
    floor: float,
) -> float:
    """Mean decrease of log regret by a candidate with levels ``own`` (P,) and the next one."""
    outcome = (own * spans)[pairs, None]
    z = (outcome - own * spans) / (_DOUBT * spans)
    log_w = -0.5 * z * z - np.log(spans)
    w = np.exp(log_w - log_w.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    following = (w @ L.T).argmax(1)
    gained = np.maximum(np.maximum(own[pairs], L[following, pairs]), 0.0)
    left = np.maximum(R[pairs] - gained, 0.0)
    return float((np.log(R[pairs] + floor) - np.log(left + floor)).mean())
