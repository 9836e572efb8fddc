"""One step of the policy for one study; the twin of ``proposal.decide`` without earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Candidates
from optuna_lora_rl.policy.features import Assessment
from optuna_lora_rl.policy.features import Features
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.proposal import ALIKE
from optuna_lora_rl.policy.proposal import CARE
from optuna_lora_rl.policy.proposal import FIRST
from optuna_lora_rl.policy.proposal import SPREAD
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.proposal import is_flag
from optuna_lora_rl.policy.proposal import room
from optuna_lora_rl.policy.single.candidates import Snap
from optuna_lora_rl.policy.single.candidates import Trials
from optuna_lora_rl.policy.single.candidates import allowed
from optuna_lora_rl.policy.single.candidates import children
from optuna_lora_rl.policy.single.candidates import climb
from optuna_lora_rl.policy.single.candidates import closeness
from optuna_lora_rl.policy.single.candidates import proposals
from optuna_lora_rl.policy.single.features import View
from optuna_lora_rl.policy.single.features import context
from optuna_lora_rl.policy.single.features import scaled_roles
from optuna_lora_rl.policy.single.features import values
from optuna_lora_rl.policy.single.network import score
from optuna_lora_rl.policy.single.process import Process
from optuna_lora_rl.policy.single.process import fit_theta
from optuna_lora_rl.policy.single.process import log_improvement
from optuna_lora_rl.policy.single.tables import Points
from optuna_lora_rl.policy.single.tables import Tables

_DEFAULT, _UNIFORM = SOURCES.index("default"), SOURCES.index("uniform")
_IMPROVEMENT = SOURCES.index("improvement")
# Log-probability that points keep the constraints, shape (N,).
Feasibility = Callable[[Points], np.ndarray]


def fit_hyperparameters(tables: Tables, trials: Trials, settings: Settings) -> np.ndarray:
    """The surrogate's, shape (D + 2,); the twin of ``proposal.fit_surrogate``."""
    return fit_theta(
        trials.points(tables).coordinates,
        trials.y,
        tables.unordered,
        tables.log_l,
        _noise(trials, settings),
        iterations=settings.iterations,
        fit_rows=settings.fit_rows,
    )


def _noise(trials: Trials, settings: Settings) -> np.ndarray:
    return np.where(trials.failed, settings.failure_noise, 0.0)


def fit_feasibility(tables: Tables, trials: Trials, constraints: np.ndarray) -> Feasibility | None:
    """A process for each constraint, values (n, k); the twin of ``proposal.fit_feasibility``."""
    models = []
    x = trials.points(tables).coordinates
    for column in constraints.T:
        known = ~np.isnan(column)
        if not known.any():
            continue
        told = torch.from_numpy(np.ascontiguousarray(column))[None]
        rows = torch.from_numpy(known)[None]
        y = room(told, rows)[0].numpy()[known]
        X, none = x[known], np.zeros(int(known.sum()))
        theta = fit_theta(X, y, tables.unordered, tables.log_l, none, iterations=40, fit_rows=100)
        flag = bool(is_flag(told, rows))
        models.append((flag, Process(X, y, tables.unordered, theta, none)))

    def log_feasible(points: Points) -> np.ndarray:
        total = np.zeros(len(points))
        for flag, model in models:
            mean, deviation = model.posterior(points.coordinates)
            z = torch.from_numpy((mean - (ALIKE if flag else 0.0)) / deviation)
            log_kept = torch.special.log_ndtr(z).numpy()
            total += CARE * log_kept if flag else log_kept
        return np.maximum(total, -50.0)

    return log_feasible if models else None


def decide(
    tables: Tables,
    trials: Trials,
    network: Scorer | None,
    snap: Snap,
    generator: torch.Generator,
    settings: Settings,
    *,
    grid: np.ndarray | None = None,
    feasibility: Feasibility | None = None,
    theta: np.ndarray | None = None,
) -> Decision:
    """Condition the surrogate, generate candidates and score them.

    Args:
        tables: of the space.
        trials: of the study.
        network: the learned scorer, ``None`` for the residual policy alone.
        snap: moves points (N, D) onto configurations that exist.
        generator: of all random numbers.
        settings: constants of the policy.
        grid: further configurations, shape (k, D).
        feasibility: log-probability that points keep the constraints.
        theta: the surrogate's hyperparameters, shape (D + 2,); fitted here where not given.
    """
    if theta is None:
        theta = fit_hyperparameters(tables, trials, settings)
    seen = trials.points(tables).coordinates
    own = Process(seen, trials.y, tables.unordered, theta, _noise(trials, settings))
    process, best = own, own.incumbent(trials.good)
    if len(trials.pending):
        pending = tables.points(trials.pending).coordinates
        best = max(best, float(own.posterior(pending)[0].max()))
        process = own.believe(pending)

    def look(points: Points) -> View:
        mean, deviation = process.posterior(points.coordinates)
        log_ei = log_improvement(mean, deviation, best).value
        sure = feasibility(points) if feasibility else np.zeros(len(points))
        return View(mean, deviation, log_ei + sure, points.log_prior, sure)

    def uphill(x: np.ndarray) -> np.ndarray:
        return climb(x, tables, process, best, settings.steps)

    weight = (1.0 + len(trials) / settings.prior_trials) ** -2
    x, source = proposals(tables, trials, snap, generator, settings.candidates, grid)
    points = tables.points(x)
    view, close = look(points), closeness(x, trials)
    rows, keep = np.arange(len(x)), 3 * max(settings.candidates // 16, 2)
    for turn in range(settings.rounds + 1):
        value = settings.beta * view.log_ei[rows] + weight * view.log_prior[rows]
        value = np.where(close.blocked[rows], np.inf, -value)
        rows = rows[np.argsort(value, kind="stable")[:keep]]
        if turn == settings.rounds:
            break
        born = tables.points(children(points.x[rows], uphill, tables, snap, generator, turn))
        rows = np.concatenate([rows, np.arange(len(points), len(points) + len(born))])
        points, view = points.with_(born), view.with_(look(born))
        close = close.with_(closeness(born.x, trials))
    rows = np.concatenate([np.arange(len(x)), rows])
    points, view, close = points[rows], view.at(rows), close[rows]
    source = np.concatenate([source, np.full(len(rows) - len(x), _IMPROVEMENT)])
    valid = allowed(points.x, close, trials)
    residual = _residual(source, valid, view, tables, trials, settings, weight)
    features = _features(points, source, valid, view, tables, trials, process, best)
    logits = residual
    if network is not None:
        each, whole = features.values.numpy()[0], features.context.numpy()[0]
        logits = residual + score(network, each, whole, valid)
    candidates = Candidates(_batch(points.x), torch.from_numpy(source), _batch(valid))
    assessment = Assessment(
        *(_batch(getattr(view, name)) for name in Assessment.__dataclass_fields__)
    )
    return Decision(
        observed=trials.observed,
        candidates=candidates,
        view=assessment,
        features=features,
        residual=_batch(residual),
        logits=_batch(logits),
        theta=_batch(theta),
    )


def _residual(
    source: np.ndarray,
    valid: np.ndarray,
    view: View,
    tables: Tables,
    trials: Trials,
    settings: Settings,
    weight: float,
) -> np.ndarray:
    """The policy without its network, shape (N,); the twin of ``proposal.residual_logits``."""
    gap = np.maximum(view.log_ei - view.log_ei[valid].max(), -20.0)
    logits = settings.beta * gap + weight * (view.log_prior - view.log_prior[valid].max())
    begun = len(trials) + len(trials.pending)
    if begun == 0:
        logits += FIRST * (source == _DEFAULT)
    elif begun < min(len(tables) + 2, 8) and not tables.is_lora:
        logits += SPREAD * (source == _UNIFORM)
    return np.where(valid, logits, -np.inf)


def _features(
    points: Points,
    source: np.ndarray,
    valid: np.ndarray,
    view: View,
    tables: Tables,
    trials: Trials,
    process: Process,
    best: float,
) -> Features:
    at = trials.best_at
    known = at is not None
    top_points = tables.usual if at is None else trials.points(tables)[np.array([at])]
    top = scaled_roles(top_points, tables)
    each = values(points, source, valid, view, tables, trials, best, top_points, top, known)
    whole = context(tables, trials, process, top[0], known)
    return Features(_batch(each), _batch(whole), _batch(valid))


def _batch(array: np.ndarray) -> Tensor:
    """A batch of one."""
    return torch.from_numpy(array[None])
