"""One step of the policy: from the trials to a scored set of candidates.

    logits = beta * (log EI - max) + lambda_n * (log prior - max) + network

With n finished trials lambda_n = 1 / (1 + n / prior_trials)^2 fades, so that the untrained policy
is "defaults, then a Gaussian process" (compare pi-BO, Hvarfner et al. 2022). The network's last
layer starts at zero: training can only move on from there.

With ``Settings.bank`` and in a LoRA space, what the trials leave of a bank of response surfaces
(:mod:`~optuna_lora_rl.policy.bank`) takes the prior's place for the first ten trials: the default
stands at the bank's learning rate, and

    EI = share * EI of the bank + (1 - share) * EI of the process

with the share that the results so far give it. Afterwards nothing of it is left.

Earlier studies (:mod:`~optuna_lora_rl.policy.transfer`) change what the surrogate expects; as far
as they are trusted, prior and network, which know nothing of them, are silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

import numpy as np
import torch

from optuna_lora_rl.policy.bank import Bank
from optuna_lora_rl.policy.bank import Posterior
from optuna_lora_rl.policy.beliefs import candidate_beliefs
from optuna_lora_rl.policy.beliefs import study_beliefs
from optuna_lora_rl.policy.candidates import MOVES
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Snap
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.candidates import allowed
from optuna_lora_rl.policy.candidates import children
from optuna_lora_rl.policy.candidates import climb
from optuna_lora_rl.policy.candidates import closeness
from optuna_lora_rl.policy.candidates import moves
from optuna_lora_rl.policy.candidates import proposals
from optuna_lora_rl.policy.candidates import strays
from optuna_lora_rl.policy.constraints import Feasibility
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.features import View
from optuna_lora_rl.policy.features import context
from optuna_lora_rl.policy.features import scaled_roles
from optuna_lora_rl.policy.features import values
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Points
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.policy.surrogate import log_improvement
from optuna_lora_rl.policy.transfer import Informed
from optuna_lora_rl.policy.transfer import SourceModel
from optuna_lora_rl.policy.transfer import weigh

_DEFAULT, _UNIFORM = SOURCES.index("default"), SOURCES.index("uniform")
_AXIS, _RATE = SOURCES.index("axis"), ROLES.index("learning_rate")
_IMPROVEMENT = SOURCES.index("improvement")
# Earlier studies that are trusted less are not asked.
_LEAST_TRUST = 0.05
# More rounds of the local search where it has no gradient to go by.
_BLIND_ROUNDS = 3
# In nats. The first trial is the default, whatever the network says: a define-by-run study's first
# trial has no joint proposal anyway. The space-filling start is a bias that it may overrule.
_FIRST, _SPREAD = 60.0, 3.0
# So many trials after the first change learning rate and size alone, or pay so many nats.
_NARROW, _STRAY = 2, 4.0
# Trials, running ones included, for which a bank of surfaces is asked.
BANKED = 10
# What is known to be taken from the scores of points x (N, D), shape (N,).
Charge = Callable[[np.ndarray], np.ndarray]


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
        bank: whether LoRA spaces begin with a bank of response surfaces. The shipped network was
            trained without.
        moves: for so many trials the incumbent at other learning rates and sizes is among the
            candidates, and the second and third trial of a LoRA space change nothing else, so
            that their results can be told apart. In training for all, so that all steps have as
            many candidates.
        wide: whether the features hold what is known of surfaces, of the run and of costs.
    """

    beta: float = 1.0
    prior_trials: float = 1.5
    failure_noise: float = 0.05
    candidates: int = 256
    rounds: int = 1
    steps: int = 3
    iterations: int = 40
    fit_rows: int = 100
    bank: bool = False
    moves: int = 0
    wide: bool = False


@dataclass
class Decision:
    """What may be proposed and how good it looks.

    Args:
        trials: before the step.
        x: candidates, shape (N, D).
        source: theirs, index into ``SOURCES``, shape (N,).
        valid: which may be proposed, shape (N,).
        view: the surrogate's and the prior's judgement of them.
        values: the network's input for each, shape (N, F).
        context: the network's input of the study, shape (C,).
        residual: logits without the network, shape (N,); -inf where not allowed.
        logits: logits with it.
        theta: the surrogate's hyperparameters, shape (D + 2,).
        trust: how far earlier studies are believed, from 0 (or none) to 1.
        share: how far the bank of surfaces is, likewise.
        surfaces: what the trials leave of it; ``None`` where it is not asked.
    """

    trials: Trials
    x: np.ndarray
    source: np.ndarray
    valid: np.ndarray
    view: View
    values: np.ndarray
    context: np.ndarray
    residual: np.ndarray
    logits: np.ndarray
    theta: np.ndarray
    trust: float = 0.0
    share: float = 0.0
    surfaces: Posterior | None = None

    def explain(self, choice: int) -> dict[str, float | str]:
        """Why a candidate was chosen, as plain values.

        ``source``: where it came from; ``mean``, ``std``: of the predicted score, standardised;
        ``log_ei``: log expected improvement, ``log_feasible`` included; ``log_prior``: log-density
        of the guides' prior; ``log_feasible``: log-probability that it neither fails nor breaks a
        constraint; ``residual`` + ``network`` = ``logit``: what the fixed part and the trained
        one say, in nats; ``surfaces``, where a bank of them was asked: its share in ``log_ei``.
        """
        residual, logit = float(self.residual[choice]), float(self.logits[choice])
        why: dict[str, float | str] = {
            "source": SOURCES[int(self.source[choice])],
            "mean": float(self.view.mean[choice]),
            "std": float(self.view.deviation[choice]),
            "log_ei": float(self.view.log_ei[choice]),
            "log_prior": float(self.view.log_prior[choice]),
            "log_feasible": float(self.view.log_feasible[choice]),
            "residual": residual,
            "network": logit - residual,
            "logit": logit,
        }
        if self.share:
            why["surfaces"] = self.share
        return why


def fit_hyperparameters(
    layout: Layout, trials: Trials, settings: Settings, start: np.ndarray | None = None
) -> np.ndarray:
    """The surrogate's, shape (D + 2,); ``start`` as for ``surrogate.fit_theta``."""
    return fit_theta(
        trials.points(layout).coordinates,
        trials.y,
        layout.unordered,
        layout.log_l,
        _noise(trials, settings),
        iterations=settings.iterations,
        fit_rows=settings.fit_rows,
        start=start,
    )


def _noise(trials: Trials, settings: Settings) -> np.ndarray:
    return np.where(trials.failed, settings.failure_noise, 0.0)


def decide(
    layout: Layout,
    trials: Trials,
    network: Correction | None,
    snap: Snap,
    generator: torch.Generator,
    settings: Settings,
    *,
    grid: np.ndarray | None = None,
    feasibility: Feasibility | None = None,
    theta: np.ndarray | None = None,
    sources: Sequence[SourceModel] = (),
    charge: Charge | None = None,
) -> Decision:
    """Condition the surrogate, generate candidates and score them.

    Args:
        layout: of the space.
        trials: of the study.
        network: the learned scorer, ``None`` for the residual policy alone.
        snap: moves points (N, D) onto configurations that exist.
        generator: of all random numbers.
        settings: constants of the policy.
        grid: further configurations, shape (k, D).
        feasibility: log-probability that points keep the constraints.
        theta: the surrogate's hyperparameters, shape (D + 2,); fitted here where not given.
        sources: what earlier studies know of this space.
        charge: what is known to be taken from the scores, in units of the trials' ``y``.
    """
    opinion = weigh(sources, layout, trials) if sources else None
    if opinion and opinion.trust < _LEAST_TRUST:
        opinion = None
    trust = opinion.trust if opinion else 0.0
    seen = trials.points(layout).coordinates
    fitted = replace(trials, y=opinion.residual(seen, trials.y)) if opinion else trials
    if theta is None:
        theta = fit_hyperparameters(layout, fitted, settings)
    own = Process(seen, fitted.y, layout.unordered, theta, _noise(trials, settings))
    process: Process | Informed = Informed(own, opinion) if opinion else own
    best = process.incumbent(trials.good, 0.0 if trials.charged is None else trials.charged)
    if len(trials.pending):
        # What is believed of a running trial is also what there is to improve on: else the next
        # proposal would gain once more what that trial gains, from right beside it.
        pending = layout.points(trials.pending).coordinates
        ahead = process.posterior(pending)[0]
        best = max(best, float((ahead - charge(trials.pending) if charge else ahead).max()))
        process = process.believe(pending)

    banked = _banked(layout, trials, settings)
    surfaces = Posterior(layout.bank, trials, charge) if banked and trials.begun else None
    share = (1.0 - trust) * surfaces.share if surfaces else 0.0

    def look(points: Points) -> View:
        mean, deviation = process.posterior(points.coordinates)
        charged = None
        if charge:
            charged = charge(points.x)
            mean = mean - charged
        log_ei = log_improvement(mean, deviation, best).value
        gain, levels = np.zeros(len(points)), np.zeros((len(points), 0), dtype=np.float32)
        if surfaces:
            gain, levels = surfaces.judge(points, charged)
            log_ei = _mixed(gain, log_ei, share)
            levels = levels if settings.wide else levels[:, :0]
        sure = feasibility(points) if feasibility else np.zeros(len(points))
        return View(mean, deviation, log_ei + sure, points.log_prior, sure, gain, levels)

    def uphill(x: np.ndarray) -> np.ndarray:
        # What earlier studies add has no gradient here.
        if isinstance(process, Informed):
            return x
        return climb(x, layout, process, best + charge(x) if charge else best, settings.steps)

    weight = (1.0 - trust) * (1.0 - share) * (1.0 + len(trials) / settings.prior_trials) ** -2
    earlier = np.concatenate([source.best for source in sources]) if opinion else None
    x, source = proposals(layout, trials, snap, generator, settings.candidates, grid, earlier)
    if banked and not trials.begun:
        x[source == _DEFAULT] = snap(layout.first[None])
    moved = trials.begun < settings.moves
    narrow = moved and layout.is_lora and 0 < trials.begun <= _NARROW
    if moved:
        x = np.concatenate([x, snap(moves(layout, trials))])
        source = np.append(source, np.full(MOVES, _AXIS))
    points = layout.points(x)
    view, close = look(points), closeness(x, trials)
    rows, keep = np.arange(len(x)), 3 * max(settings.candidates // 16, 2)
    rounds = settings.rounds + (_BLIND_ROUNDS if opinion else 0)
    for turn in range(rounds + 1):
        value = settings.beta * view.log_ei[rows] + weight * view.log_prior[rows]
        value = np.where(close.blocked[rows], np.inf, -value)
        rows = rows[np.argsort(value, kind="stable")[:keep]]
        if turn == rounds:
            break
        born = layout.points(children(points.x[rows], uphill, layout, snap, generator, turn))
        rows = np.concatenate([rows, np.arange(len(points), len(points) + len(born))])
        points, view = points.with_(born), view.with_(look(born))
        close = close.with_(closeness(born.x, trials))
    rows = np.concatenate([np.arange(len(x)), rows])
    points, view, close = points[rows], view.at(rows), close[rows]
    source = np.concatenate([source, np.full(len(rows) - len(x), _IMPROVEMENT)])
    valid = allowed(points.x, close, trials)
    # With earlier studies the first trial is theirs; the guides' is what it is compared with.
    opening = (1.0 - trust) * _opening(source, layout, trials, 1 if sources else 0)
    residual = _residual(valid, view, settings, weight) + opening
    if narrow:
        residual = residual - _STRAY * strays(layout, trials, points.x)
    each, whole = _features(points, source, valid, view, layout, trials, theta, best)
    if settings.wide:
        each, whole = _widened(each, whole, points, valid, view, layout, trials, surfaces, charge)
    logits = residual
    if network is not None:
        logits = residual + (1.0 - trust) * network(each, whole, valid)
    return Decision(
        trials, points.x, source, valid, view, each, whole, residual, logits, theta, trust, share,
        surfaces,
    )  # fmt: skip


def _banked(layout: Layout, trials: Trials, settings: Settings) -> bool:
    """Whether a bank of surfaces is asked."""
    asked = settings.bank and layout.is_lora and trials.begun < BANKED
    return asked and layout.bank.speaks


def _mixed(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The log of a share of exp(one) and the rest of exp(other), shape (N,)."""
    few = 1e-12
    return np.logaddexp(one + math.log(max(share, few)), other + math.log(max(1.0 - share, few)))


def _residual(valid: np.ndarray, view: View, settings: Settings, weight: float) -> np.ndarray:
    """The policy without its network, shape (N,)."""
    gap = np.maximum(view.log_ei - view.log_ei[valid].max(), -20.0)
    logits = settings.beta * gap + weight * (view.log_prior - view.log_prior[valid].max())
    return np.where(valid, logits, -np.inf)


def _opening(source: np.ndarray, layout: Layout, trials: Trials, default_at: int) -> np.ndarray:
    """The opening moves, shape (N,): the default first; a spread start where nothing is known.

    Without a prior the first trials come from the quasi-random points (the least explored of
    them), since expected improvement by two or three trials only visits corners.
    """
    begun = trials.begun
    spread = 0 < begun < min(len(layout) + 2, 8) and not layout.is_lora
    return _FIRST * ((source == _DEFAULT) & (begun == default_at)) + _SPREAD * (
        (source == _UNIFORM) & spread
    )


def _features(
    points: Points,
    source: np.ndarray,
    valid: np.ndarray,
    view: View,
    layout: Layout,
    trials: Trials,
    theta: np.ndarray,
    best: float,
) -> tuple[np.ndarray, np.ndarray]:
    at = trials.best_at
    known = at is not None
    top_points = layout.usual if at is None else trials.points(layout)[np.array([at])]
    top = scaled_roles(top_points, layout)
    each = values(points, source, valid, view, layout, trials, best, top_points, top, known)
    return each, context(layout, trials, theta, top[0], known)


def _widened(
    each: np.ndarray,
    whole: np.ndarray,
    points: Points,
    valid: np.ndarray,
    view: View,
    layout: Layout,
    trials: Trials,
    surfaces: Posterior | None,
    charge: Charge | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The features with those of surfaces, run and costs behind them."""
    at, charged, rate = trials.best_at, None, None
    if charge:
        paid = trials.charged[at] if at is not None and trials.charged is not None else 0.0
        charged = charge(points.x) - paid
    if at is not None and layout.column[_RATE] >= 0:
        rate = float(trials.points(layout).roles[at, _RATE])
    return (
        np.concatenate([each, candidate_beliefs(view, valid, surfaces, charged)], 1),
        np.concatenate([whole, study_beliefs(layout, surfaces, rate)]),
    )


def draw_parameter(
    space: Space,
    given: np.ndarray,
    column: int,
    generator: torch.Generator | None,
    *,
    bank: bool = False,
    tuning: TuningContext | None = None,
) -> float:
    """The unit coordinate of one parameter, the others given or unknown.

    Args:
        space: the parameter with those that the trial already has.
        given: their point, shape (d,); NaN where unknown.
        column: of the parameter.
        generator: for a draw from the prior; ``None`` for the guides' value.
        bank: whether a bank of surfaces chooses the learning rate instead of the guides.
        tuning: what is known of model, data and run.
    """
    prior = space_prior(space, tuning)
    if generator is None:
        point = prior.point(given)
        if bank and space.dimensions[column].role == "learning_rate":
            point = space.snap(Bank(Layout(space, tuning)).at_best_rate(point))
        return float(point[column])
    weight = torch.from_numpy(prior.log_density_given(given)[column]).exp()
    cell = int(torch.multinomial(weight, 1, generator=generator))
    within = float(torch.rand(1, generator=generator)) - 0.5
    return min(max((cell + within) / (len(weight) - 1), 0.0), 1.0)
