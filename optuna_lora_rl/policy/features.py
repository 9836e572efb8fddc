"""What the network sees of a candidate and of the study, free of the space's dimension.

Notations
    B, N      tasks and candidates
    values    per candidate, shape (B, N, len(CANDIDATE_FEATURES))
    context   per study, shape (B, len(CONTEXT_FEATURES))

Roles come as a value and a mask, so that an absent role reads 0 and is known to be absent. The
names below are the layout: weights carry its hash and are refused by another layout.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Candidates
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.surrogate import Surrogate
from optuna_lora_rl.policy.surrogate import log_expected_improvement

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
LAYOUT_HASH = hashlib.sha256("|".join(CANDIDATE_FEATURES + CONTEXT_FEATURES).encode()).hexdigest()[
    :16
]


@dataclass
class Assessment:
    """The surrogate's and the prior's view of candidates, each of shape (B, N)."""

    mean: Tensor
    deviation: Tensor
    log_ei: Tensor
    log_prior: Tensor
    log_feasible: Tensor


@dataclass
class Features:
    """See the module's notations."""

    values: Tensor
    context: Tensor
    valid: Tensor


def assess(
    x: Tensor, layout: Layout, surrogate: Surrogate, best: Tensor, log_feasible: Tensor
) -> Assessment:
    """Judge points x by the surrogate (expected improvement over ``best``) and the prior."""
    mean, deviation = surrogate.posterior(layout.model_coordinates(x))
    log_ei = log_expected_improvement(mean, deviation, best[:, None]) + log_feasible
    return Assessment(mean, deviation, log_ei, layout.log_prior(x), log_feasible)


def _distance(x: Tensor, others: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    """Distance to the nearest masked point, scaled to 1 across the cube; 1 without any."""
    if not others.shape[1]:
        return torch.ones(x.shape[:2], dtype=x.dtype)
    weight = layout.real.to(x.dtype)
    p, q = x * weight[:, None], others * weight[:, None]
    r2 = (p * p).sum(-1)[:, :, None] + (q * q).sum(-1)[:, None, :] - 2.0 * p @ q.transpose(1, 2)
    r = (r2.clamp_min(0.0) / weight.sum(1).clamp_min(1.0)[:, None, None]).sqrt()
    return torch.where(mask[:, None, :], r, torch.ones_like(r)).amin(-1).clamp_max(1.0)


def _scaled_roles(layout: Layout, x: Tensor) -> Tensor:
    centre = torch.tensor([SCALES[role][0] for role in ROLES], dtype=x.dtype)
    scale = torch.tensor([SCALES[role][1] for role in ROLES], dtype=x.dtype)
    values = (layout.role_values(x) - centre) / scale
    return (values * layout.has_role[:, None, :]).clamp(-4.0, 4.0)


def _ratio(layout: Layout, values: Tensor) -> tuple[Tensor, Tensor]:
    """log2(alpha / rank), scaled, and where it is known."""
    rank, alpha, given = (ROLES.index(role) for role in ("rank", "alpha", "alpha_ratio"))
    both = layout.has_role[:, rank] & layout.has_role[:, alpha]
    computed = values[:, :, alpha] - values[:, :, rank]
    ratio = torch.where(both[:, None], computed, values[:, :, given]) - 1.0
    known = both | layout.has_role[:, given]
    ratio = torch.where(known[:, None], ratio, torch.zeros_like(ratio))
    return ratio.clamp(-6.0, 6.0) / 2.0, known[:, None].expand_as(ratio).to(values.dtype)


def features(
    candidates: Candidates,
    view: Assessment,
    layout: Layout,
    observed: Observed,
    surrogate: Surrogate,
    best: Tensor,
) -> Features:
    """The network's input for one step; ``best`` is the incumbent's score, shape (B,)."""
    x = candidates.x
    top, known = observed.best(1)
    if not top.shape[1]:
        top, known = layout.default[:, None], torch.zeros_like(layout.is_lora)[:, None]
    top = torch.where(known[:, :, None], top, layout.default[:, None])
    roles, top_roles = _scaled_roles(layout, x), _scaled_roles(layout, top)
    ratio, ratio_known = _ratio(layout, layout.role_values(x))
    lr = ROLES.index("learning_rate")
    place = x.gather(
        2, layout.role_column[:, lr].clamp_min(0)[:, None, None].expand_as(x[:, :, :1])
    )
    place = (place[:, :, 0] - 0.5) * 2.0 * layout.has_role[:, lr, None]
    ei_gap = (view.log_ei - _peak(view.log_ei, candidates.valid)).clamp_min(-10.0)
    prior_gap = (view.log_prior - _peak(view.log_prior, candidates.valid)).clamp_min(-10.0)
    columns = [
        view.mean - best[:, None],
        view.deviation,
        ei_gap / 3.0,
        _rank(view.log_ei),
        torch.special.ndtr((view.mean - best[:, None]) / view.deviation),
        prior_gap / 3.0,
        _distance(x, observed.x, observed.good, layout),
        _distance(x, top, known, layout),
        _distance(x, observed.x, observed.mask & observed.failed, layout),
        _distance(x, observed.pending, observed.pending_mask, layout),
        view.log_feasible.clamp_min(-6.0) / 3.0,
        ratio,
        ratio_known,
    ]
    source = torch.nn.functional.one_hot(candidates.source, len(SOURCES)).to(x.dtype)
    values = torch.cat(
        [
            torch.stack(columns, -1),
            roles,
            roles - top_roles,
            place[:, :, None],
            source[None].expand(len(x), -1, -1),
        ],
        -1,
    )
    context = _context(layout, observed, surrogate, top_roles, known[:, 0])
    return Features(values.float().clamp(-8.0, 8.0), context.float(), candidates.valid)


def _peak(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, -torch.inf).amax(1, keepdim=True)


def _rank(values: Tensor) -> Tensor:
    """Ranks among the candidates scaled to [0, 1], 1 for the largest; shape kept."""
    order = values.argsort(1).argsort(1).to(values.dtype)
    return order / max(values.shape[1] - 1, 1)


def _context(
    layout: Layout, observed: Observed, surrogate: Surrogate, top_roles: Tensor, known: Tensor
) -> Tensor:
    lr = ROLES.index("learning_rate")
    n = observed.mask.sum(1).to(torch.float64)
    horizon = observed.horizon.to(torch.float64)
    has_horizon = (horizon > 0).to(torch.float64)
    left = (horizon - n).clamp_min(0.0)
    has_lr = layout.has_role[:, lr]
    low, high = layout.natural[:, lr, 0], layout.natural[:, lr, -1]
    width = (high - low).clamp_min(1e-3)
    column = layout.role_column[:, lr].clamp_min(0)
    length = surrogate.log_l.gather(1, column[:, None])[:, 0]
    recency, gain = _progress(observed)
    columns = [
        layout.is_lora,
        layout.real.sum(1) / 10.0,
        n.add(1.0).log() / 3.0,
        n == 0,
        n == 1,
        n == 2,
        left.add(1.0).log() / 3.0 * has_horizon,
        (n / horizon.clamp_min(1.0)).clamp_max(1.0) * has_horizon,
        has_horizon,
        (observed.mask & observed.failed).sum(1) / n.clamp_min(1.0),
        observed.pending_mask.sum(1) / 4.0,
        _agreement(layout, observed),
        gain,
        recency,
        surrogate.log_v / 5.0,
        length * has_lr,
        ((GUIDE_LR - low) / width - 0.5).clamp(-2.0, 2.0) * has_lr,
        (0.5 * (low + high) - GUIDE_LR).clamp(-4.0, 4.0) / 2.0 * has_lr,
        width.clamp_max(8.0) / 4.0 * has_lr,
        top_roles[:, 0, lr] * known,
        ((top_roles[:, 0, lr] + GUIDE_LR - low) / width - 0.5).clamp(-2.0, 2.0) * known * has_lr,
    ]
    base = torch.stack([c.to(torch.float64) for c in columns], -1)
    return torch.cat([base, layout.has_role.to(torch.float64)], -1).clamp(-8.0, 8.0)


def _agreement(layout: Layout, observed: Observed) -> Tensor:
    """How well the prior has ranked the results so far: their correlation, shape (B,)."""
    if not observed.x.shape[1]:
        return torch.zeros(len(layout), dtype=torch.float64)
    mask = observed.mask.to(torch.float64)
    count = mask.sum(1, keepdim=True).clamp_min(1.0)
    p, y = layout.log_prior(observed.x), observed.y
    p = (p - (p * mask).sum(1, keepdim=True) / count) * mask
    y = (y - (y * mask).sum(1, keepdim=True) / count) * mask
    scale = ((p * p).sum(1) * (y * y).sum(1)).sqrt()
    return torch.where(scale > 1e-9, (p * y).sum(1) / scale.clamp_min(1e-9), 0.0 * scale)


def _progress(observed: Observed) -> tuple[Tensor, Tensor]:
    """Trials since the best one (log scale) and its lead over the first trial, each (B,)."""
    B, n = observed.mask.shape
    if not n:
        return torch.zeros(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    y = torch.where(observed.good, observed.y, -torch.inf)
    best, position = y.max(1)
    some = observed.good.any(1)
    since = observed.mask.sum(1) - 1 - position
    gain = torch.where(some, best, torch.zeros_like(best)) - observed.y[:, 0]
    return (
        torch.where(some, since.clamp_min(0).add(1.0).log() / 3.0, torch.zeros_like(gain)),
        torch.where(some, gain, torch.zeros_like(gain)).clamp(-4.0, 4.0) / 2.0,
    )
