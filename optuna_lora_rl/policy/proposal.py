"""One step of the policy: from the trials to a scored set of candidates.

    logits = beta * (log EI - max) + lambda_n * (log prior - max) + network

With n finished trials lambda_n = 1 / (1 + n / prior_trials)^2 fades, so that the untrained policy
is "defaults, then a Gaussian process" (compare pi-BO, Hvarfner et al. 2022). The network's last
layer starts at zero: training can only move on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.ascent import climb
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Candidates
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.candidates import propose_candidates
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.features import Assessment
from optuna_lora_rl.policy.features import Features
from optuna_lora_rl.policy.features import assess
from optuna_lora_rl.policy.features import features
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Snap
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.scores import power
from optuna_lora_rl.policy.surrogate import Surrogate
from optuna_lora_rl.policy.surrogate import believe
from optuna_lora_rl.policy.surrogate import fit

# Most units that a constraint is kept or broken by.
_FARTHEST = 3.0
# A constraint that only says kept or broken is taken as +1 or -1. Its limit may lie anywhere
# between the two, and improvement lures beyond it: a point has to look more like what was kept
# by so much, and that counts so many times.
ALIKE, CARE = 0.5, 8.0
Feasibility = Callable[[Tensor], Tensor]


# In nats. The first trial is the default, whatever the network says: a define-by-run study's first
# trial has no joint proposal anyway. The space-filling start is a bias that it may overrule.
FIRST, SPREAD = 60.0, 3.0


@dataclass(frozen=True)
class Settings:
    """Constants of the residual policy.

    Args:
        beta: weight of the log expected improvement.
        prior_trials: after about so many trials the prior has lost most of its weight.
        failure_noise: noise variance of the score that a failed trial is given.
        candidates: about how many candidates a step.
        rounds: of the local search for expected improvement.
        steps: uphill in each of them.
        iterations: of the surrogate's fit.
        fit_rows: most trials that its hyperparameters are fitted to.
    """

    beta: float = 1.0
    prior_trials: float = 1.5
    failure_noise: float = 0.05
    candidates: int = 256
    rounds: int = 1
    steps: int = 3
    iterations: int = 40
    fit_rows: int = 100


@dataclass
class Decision:
    """A step of a batch of tasks: what may be proposed and how good it looks.

    Args:
        observed: the trials before the step.
        candidates: configurations with their sources.
        view: the surrogate's and the prior's judgement.
        features: the network's input.
        residual: logits without the network, shape (B, N); -inf where not allowed.
        logits: logits with it.
        theta: the surrogate's hyperparameters, which can start the next fit, shape (B, D + 2).
    """

    observed: Observed
    candidates: Candidates
    view: Assessment
    features: Features
    residual: Tensor
    logits: Tensor
    theta: Tensor


def prior_weight(observed: Observed, settings: Settings) -> Tensor:
    """lambda_n, shape (B,)."""
    n = observed.mask.sum(1).to(torch.float64)
    return (1.0 + n / settings.prior_trials) ** -2


def residual_logits(
    candidates: Candidates,
    view: Assessment,
    layout: Layout,
    observed: Observed,
    settings: Settings,
) -> Tensor:
    """The policy without its network, shape (B, N).

    Args:
        candidates: to be scored.
        view: the surrogate's and the prior's judgement.
        layout: the spaces.
        observed: the trials.
        settings: constants of the policy.
    """
    valid, source = candidates.valid, candidates.source
    log_ei = torch.where(valid, view.log_ei, -torch.inf)
    log_prior = torch.where(valid, view.log_prior, -torch.inf)
    weight = prior_weight(observed, settings)[:, None]
    gap = (log_ei - log_ei.amax(1, keepdim=True)).clamp_min(-20.0)
    logits = settings.beta * gap + weight * (log_prior - log_prior.amax(1, keepdim=True))
    opening = _opening(source, layout, observed)
    return torch.where(valid, logits + opening, -torch.inf)


def _opening(source: Tensor, layout: Layout, observed: Observed) -> Tensor:
    """The opening moves: the default first; a space-filling start where nothing is known.

    Without a prior the first trials come from the quasi-random points (the least explored of
    them), since expected improvement by two or three trials only visits corners.
    """
    n = (observed.mask.sum(1) + observed.pending_mask.sum(1))[:, None]
    start = (layout.real.sum(1)[:, None] + 2).clamp_max(8)
    default = (source == SOURCES.index("default"))[None] & (n == 0)
    spread = (source == SOURCES.index("uniform"))[None] & (n > 0) & (n < start)
    return FIRST * default + SPREAD * (spread & ~layout.is_lora[:, None])


def decide(
    layout: Layout,
    observed: Observed,
    network: Scorer | None,
    snap: Snap,
    generator: torch.Generator,
    settings: Settings,
    *,
    grid: Tensor | None = None,
    feasibility: Feasibility | None = None,
    start: Tensor | None = None,
) -> Decision:
    """Fit the surrogate, generate candidates and score them.

    Args:
        layout: the spaces of the batch.
        observed: their trials.
        network: the learned scorer, ``None`` for the residual policy alone.
        snap: moves points onto configurations that exist.
        generator: of all random numbers.
        settings: constants of the policy.
        grid: all configurations of a small discrete space, shape (B, k, D).
        feasibility: log-probability that points (B, N, D) keep the constraints, shape (B, N).
        start: hyperparameters from which to start the surrogate's fit.
    """
    extra = _failure_noise(observed, settings)
    y = observed.y
    surrogate = own = fit_surrogate(layout, observed, settings, start=start)
    best = (
        surrogate.incumbent(observed.good)
        if observed.x.shape[1]
        else observed.horizon.double() * 0.0
    )
    if observed.pending.shape[1]:
        pending = layout.model_coordinates(observed.pending)
        # What is believed of a running trial is also what there is to improve on: else the next
        # proposal would gain once more what that trial gains, from right beside it.
        mean, _ = surrogate.posterior(pending)
        expected = torch.where(observed.pending_mask, mean, -torch.inf).amax(1)
        best = torch.maximum(best, expected)
        surrogate = believe(own, y, extra, pending, observed.pending_mask)

    def look(x: Tensor) -> Assessment:
        sure = torch.zeros(x.shape[:2], dtype=torch.float64)
        return assess(x, layout, surrogate, best, feasibility(x) if feasibility else sure)

    def uphill(x: Tensor) -> Tensor:
        return climb(x, layout, surrogate, best, settings.steps)

    weight = prior_weight(observed, settings)[:, None]

    def acquisition(x: Tensor) -> Tensor:
        view = look(x)
        return settings.beta * view.log_ei + weight * view.log_prior

    candidates = propose_candidates(
        layout,
        observed,
        acquisition,
        snap,
        generator,
        climb=uphill,
        count=settings.candidates,
        rounds=settings.rounds,
        grid=grid,
    )
    view = look(candidates.x)
    seen = features(candidates, view, layout, observed, surrogate, best)
    residual = residual_logits(candidates, view, layout, observed, settings)
    logits = residual if network is None else residual + network(seen).double()
    return Decision(observed, candidates, view, seen, residual, logits, own.theta)


def _failure_noise(observed: Observed, settings: Settings) -> Tensor:
    return torch.where(observed.failed, settings.failure_noise, 0.0).to(torch.float64)


def fit_surrogate(
    layout: Layout, observed: Observed, settings: Settings, *, start: Tensor | None = None
) -> Surrogate:
    """The process over the finished trials; see :func:`decide`."""
    return fit(
        layout.model_coordinates(observed.x) if observed.x.shape[1] else observed.x,
        observed.y,
        observed.mask,
        layout.unordered,
        layout.lengthscales(),
        extra=_failure_noise(observed, settings),
        start=start,
        iterations=settings.iterations,
        fit_rows=settings.fit_rows,
    )


def fit_feasibility(layout: Layout, observed: Observed, constraints: Tensor) -> Feasibility | None:
    """The log-probability that all constraints are kept, from a process for each of them.

    Args:
        layout: of a batch.
        observed: its trials.
        constraints: values, feasible when all <= 0, shape (B, n, number of constraints); NaN
            where unknown.

    Returns:
        ``None`` without any known value (Gardner et al. 2014, constraints taken as independent).
    """
    models = []
    for k in range(constraints.shape[2]):
        values = constraints[:, :, k]
        known = observed.mask & ~values.isnan()
        if not bool(known.any()):
            continue
        y = room(values, known)
        x = layout.model_coordinates(observed.x)
        models.append(
            (
                is_flag(values, known),
                fit(x, y, known, layout.unordered, layout.lengthscales(), fit_rows=100),
            )
        )

    def log_feasible(x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[:2], dtype=torch.float64)
        for flag, model in models:
            mean, deviation = model.posterior(layout.model_coordinates(x))
            log_kept = torch.special.log_ndtr((mean - ALIKE * flag) / deviation)
            total = total + torch.where(flag, CARE * log_kept, log_kept)
        return total.clamp_min(-50.0)

    return log_feasible if models else None


def is_flag(values: Tensor, known: Tensor) -> Tensor:
    """Whether a constraint only says kept or broken, shape (B, 1).

    Either it has no value below 0, or one for all that keep it and one for all that break it.
    """
    over = values > 0
    apart = _alike(values, known & over) & _alike(values, known & ~over)
    # Of two trials each has its own value anyway.
    repeated = known.sum(1, keepdim=True) > 2
    return ~(known & (values < 0)).any(1, keepdim=True) | (apart & repeated)


def _alike(values: Tensor, rows: Tensor) -> Tensor:
    """Whether there are such rows, all with one value, shape (B, 1)."""
    low = torch.where(rows, values, torch.inf).amin(1, keepdim=True)
    return rows.any(1, keepdim=True) & (
        low == torch.where(rows, values, -torch.inf).amax(1, keepdim=True)
    )


def room(values: Tensor, known: Tensor) -> Tensor:
    """How much room constraints leave, about 1 in size, 0 at the limit, shape (B, n).

    The unit is the root mean square, not the median: trials gather at the limit, and in a unit
    that shrinks with them the rest would look like a cliff. Where a constraint only says kept or
    broken, it is 1 or -1. Infinite values are as far as values can be.
    """
    size = torch.where(known & values.isfinite(), values.abs(), torch.nan)
    usual = torch.where(size > 0, size, torch.nan).nanmedian(1, keepdim=True).values
    # Squares of values of any size must neither overflow nor vanish.
    about = power(usual.nan_to_num(1.0))
    typical = torch.where(size <= 1e3 * usual, size, torch.nan) / about
    unit = about * typical.square().nanmean(1, keepdim=True).sqrt().nan_to_num(1.0)
    broken = torch.where(values > 0, 1.0, -1.0)
    far = (values / unit).clamp(-_FARTHEST, _FARTHEST)
    return torch.where(known, -torch.where(is_flag(values, known), broken, far), 0.0)


def draw_parameter(
    space: Space, given: np.ndarray, column: int, generator: torch.Generator | None
) -> float:
    """The unit coordinate of one parameter, the others given or unknown.

    Args:
        space: the parameter with those that the trial already has.
        given: their point, shape (d,); NaN where unknown.
        column: of the parameter.
        generator: for a draw from the prior; ``None`` for the guides' value.
    """
    prior = space_prior(space, lora=True)
    if generator is None:
        return float(prior.point(given)[column])
    weight = torch.from_numpy(prior.log_density_given(given)[column]).exp()
    cell = int(torch.multinomial(weight, 1, generator=generator))
    within = float(torch.rand(1, generator=generator)) - 0.5
    return min(max((cell + within) / (len(weight) - 1), 0.0), 1.0)
