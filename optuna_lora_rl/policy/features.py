"""What the network sees of a candidate and of the study, free of the space's dimension.

Notations
    N         candidates
    values    per candidate, shape (N, len(CANDIDATE_FEATURES))
    context   per study, shape (len(CONTEXT_FEATURES),)

An absent role reads 0, and a feature says that it is absent. The names below are the layout:
weights carry its hash and are refused by another layout.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch

from optuna_lora_rl.policy.beliefs import CANDIDATE_BELIEFS
from optuna_lora_rl.policy.beliefs import STUDY_BELIEFS
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Points
from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES

# Centre and scale that bring each role's natural value to about [-2, 2].
SCALES = {
    "learning_rate": (GUIDE_LR, 1.0),
    "rank": (4.5, 1.5),
    "alpha": (5.5, 1.5),
    "alpha_ratio": (1.0, 1.0),
    "dropout": (0.05, 0.05),
    "targets": (0.6, 0.4),
    "layers": (0.75, 0.25),
    "batch_size": (3.5, 1.5),
    "weight_decay": (0.05, 0.05),
    "warmup": (0.05, 0.05),
    "steps": (6.0, 3.0),
}
CANDIDATE_FEATURES = (
    "mean",
    "deviation",
    "log_ei",
    "log_ei_rank",
    "probability_of_improvement",
    "log_prior",
    "distance_observed",
    "distance_best",
    "distance_failed",
    "distance_pending",
    "log_feasible",
    "log_ratio",
    "log_ratio_known",
    *(f"role_{role}" for role in ROLES),
    *(f"from_best_{role}" for role in ROLES),
    "place_in_learning_rate_range",
    *(f"source_{source}" for source in SOURCES),
)
CONTEXT_FEATURES = (
    "is_lora",
    "dimensions",
    "log_trials",
    "first",
    "second",
    "third",
    "log_left",
    "share_done",
    "horizon_known",
    "share_failed",
    "pending",
    "prior_agreement",
    "gain_over_default",
    "since_best",
    "log_noise",
    "log_lengthscale_learning_rate",
    "guide_in_range",
    "range_centre",
    "range_width",
    "best_learning_rate",
    "best_place_in_range",
    *(f"has_{role}" for role in ROLES),
)


def _hash(*names: str) -> str:
    return hashlib.sha256("|".join(names).encode()).hexdigest()[:16]


LAYOUT_HASH = _hash(*CANDIDATE_FEATURES, *CONTEXT_FEATURES)
# With what is seen of surfaces, of the run and of known costs.
WIDE_HASH = _hash(*CANDIDATE_FEATURES, *CANDIDATE_BELIEFS, *CONTEXT_FEATURES, *STUDY_BELIEFS)
_LR, _RANK, _ALPHA, _RATIO = (
    ROLES.index(role) for role in ("learning_rate", "rank", "alpha", "alpha_ratio")
)
_CENTRE = np.array([SCALES[role][0] for role in ROLES])
_SCALE = np.array([SCALES[role][1] for role in ROLES])
_ROLES_AT = CANDIDATE_FEATURES.index(f"role_{ROLES[0]}")
_FROM_AT = CANDIDATE_FEATURES.index(f"from_best_{ROLES[0]}")
_PLACE_AT = CANDIDATE_FEATURES.index("place_in_learning_rate_range")
_SOURCE_AT = _PLACE_AT + 1


class View(NamedTuple):
    """The surrogate's and the prior's judgement of points, each of shape (N,).

    Then that of the response surfaces: the log of the improvement that they expect, (N,), and
    their levels, (N, P), see :mod:`~optuna_lora_rl.policy.beliefs`; nothing where none are asked.
    """

    mean: np.ndarray
    deviation: np.ndarray
    log_ei: np.ndarray
    log_prior: np.ndarray
    log_feasible: np.ndarray
    surfaces_gain: np.ndarray
    levels: np.ndarray

    def at(self, rows: np.ndarray) -> View:
        """Of some of the points."""
        return View(*(column[rows] for column in self))

    def with_(self, other: View) -> View:
        """These, then those."""
        return View(*map(np.concatenate, zip(self, other, strict=True)))


def values(
    points: Points,
    source: np.ndarray,
    valid: np.ndarray,
    view: View,
    layout: Layout,
    trials: Trials,
    best: float,
    top: Points,
    top_roles: np.ndarray,
    known: bool,
) -> np.ndarray:
    """The features of candidates, shape (N, len(CANDIDATE_FEATURES)); in single precision.

    Args:
        points: the candidates.
        source: theirs, shape (N,).
        valid: which may be proposed, shape (N,).
        view: of the candidates.
        layout: of the space.
        trials: of the study.
        best: the incumbent's score.
        top: the best trial, or the default.
        top_roles: its roles, scaled.
        known: whether it is a trial.
    """
    x, N = points.x, len(points)
    table = np.zeros((N, len(CANDIDATE_FEATURES)), dtype=np.float32)
    lead = view.mean - best
    z = torch.from_numpy(lead / view.deviation)
    roles = scaled_roles(points, layout)
    columns = [
        lead,
        view.deviation,
        np.maximum(view.log_ei - _peak(view.log_ei, valid), -10.0) / 3.0,
        _rank(view.log_ei),
        torch.special.ndtr(z).numpy(),
        np.maximum(view.log_prior - _peak(view.log_prior, valid), -10.0) / 3.0,
        _distance(x, trials.x[trials.good]),
        _distance(x, top.x if known else top.x[:0]),
        _distance(x, trials.x[trials.failed]),
        _distance(x, trials.pending),
        np.maximum(view.log_feasible, -6.0) / 3.0,
    ]
    for at, column in enumerate(columns):
        table[:, at] = column
    # All that follow are within the bounds as they are.
    unbounded = table[:, : len(columns)]
    np.minimum(np.maximum(unbounded, -8.0), 8.0, out=unbounded)
    ratio = _ratio(points, layout)
    if ratio is not None:
        table[:, len(columns)] = ratio
        table[:, len(columns) + 1] = 1.0
    table[:, _ROLES_AT:_FROM_AT] = roles
    table[:, _FROM_AT:_PLACE_AT] = roles - top_roles
    if layout.column[_LR] >= 0:
        table[:, _PLACE_AT] = (x[:, layout.column[_LR]] - 0.5) * 2.0
    table[np.arange(N), _SOURCE_AT + source] = 1.0
    return table


def scaled_roles(points: Points, layout: Layout) -> np.ndarray:
    """Natural values of the roles, scaled to about [-2, 2], shape (N, R); 0 where absent."""
    scaled = np.zeros_like(points.roles)
    present = layout.present
    own = (points.roles.take(present, 1) - _CENTRE[present]) / _SCALE[present]
    scaled[:, present] = np.minimum(np.maximum(own, -4.0), 4.0)
    return scaled


def _ratio(points: Points, layout: Layout) -> np.ndarray | None:
    """log2(alpha / rank), scaled; ``None`` where it is not known."""
    if layout.turns:
        ratio = points.roles[:, _ALPHA] - points.roles[:, _RANK]
    elif layout.column[_RATIO] >= 0:
        ratio = points.roles[:, _RATIO]
    else:
        return None
    return np.minimum(np.maximum(ratio - 1.0, -6.0), 6.0) / 2.0


def _peak(column: np.ndarray, valid: np.ndarray) -> float:
    return float(column[valid].max())


def _rank(column: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(column))
    ranks[np.argsort(column, kind="stable")] = np.arange(len(column))
    return ranks / max(len(column) - 1, 1)


def _distance(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance to the nearest of the others (k, D), scaled to 1 across the cube; 1 without any."""
    if not len(others):
        return np.ones(len(x))
    r2 = (-2.0 * others) @ x.T
    r2 += (others * others).sum(1)[:, None]
    nearest = r2.min(0) + (x * x).sum(1)
    return np.minimum(np.sqrt(np.maximum(nearest, 0.0) / max(x.shape[1], 1)), 1.0)


def context(
    layout: Layout, trials: Trials, theta: np.ndarray, top_roles: np.ndarray, known: bool
) -> np.ndarray:
    """The study's features, shape (len(CONTEXT_FEATURES),), in single precision."""
    n, horizon = len(trials), trials.horizon
    recency, gain = _progress(trials)
    row = [
        float(layout.is_lora),
        len(layout) / 10.0,
        math.log(n + 1.0) / 3.0,
        float(n == 0),
        float(n == 1),
        float(n == 2),
        math.log(max(horizon - n, 0) + 1.0) / 3.0 if horizon else 0.0,
        min(n / max(horizon, 1), 1.0) if horizon else 0.0,
        float(horizon > 0),
        float(trials.failed.sum()) / max(n, 1),
        len(trials.pending) / 4.0,
        _agreement(layout, trials),
        gain,
        recency,
        float(theta[-1]) / 5.0,
    ]
    if layout.column[_LR] >= 0:
        low, high = float(layout.natural[_LR, 0]), float(layout.natural[_LR, -1])
        width, value = max(high - low, 1e-3), float(top_roles[_LR]) * known
        row += [
            float(theta[layout.column[_LR]]),
            min(max((GUIDE_LR - low) / width - 0.5, -2.0), 2.0),
            min(max(0.5 * (low + high) - GUIDE_LR, -4.0), 4.0) / 2.0,
            min(width, 8.0) / 4.0,
            value,
            min(max((value + GUIDE_LR - low) / width - 0.5, -2.0), 2.0) * known,
        ]
    else:
        row += [0.0] * 6
    row += [float(column >= 0) for column in layout.column]
    return np.minimum(np.maximum(row, -8.0), 8.0).astype(np.float32)


def _agreement(layout: Layout, trials: Trials) -> float:
    if not len(trials):
        return 0.0
    p = trials.points(layout).log_prior
    p, y = p - p.mean(), trials.net - trials.net.mean()
    scale = math.sqrt(float((p * p).sum() * (y * y).sum()))
    return float((p * y).sum()) / scale if scale > 1e-9 else 0.0


def _progress(trials: Trials) -> tuple[float, float]:
    """Trials since the best one (log scale) and its lead over the first trial."""
    best = trials.best_at
    if best is None:
        return 0.0, 0.0
    gain = float(trials.net[best] - trials.net[0])
    since = len(trials) - 1 - best
    return math.log(since + 1.0) / 3.0, min(max(gain, -4.0), 4.0) / 2.0
