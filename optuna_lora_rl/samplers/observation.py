"""A study's history as the policy takes it: few enough trials, one score each, no gaps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from optuna.study import StudyDirection

from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.conditions import Condition
from optuna_lora_rl.policy.conditions import learn_conditions
from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.scores import unit
from optuna_lora_rl.samplers.history import History

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna_lora_rl.policy.dimensions import Space

# Trials that the surrogate is conditioned on: the best and the most recent of a long study.
_MAX_TRIALS = 200
_MAX_PENDING = 32
# So many failures are no accident.
_NO_ACCIDENT = 2
# Units of score that the costs of a space differ by, as long as nobody can say.
_SPREAD = 0.2
# Costs of points (N, D), shape (N,).
Costs = Callable[[np.ndarray], np.ndarray]


def constraints_of(history: History) -> np.ndarray:
    """Constraints of finished trials, shape (n, k); failing repeatedly is one more."""
    failed = history.failed.astype(float)[:, None]
    told = history.constraints
    return np.concatenate([told, failed], axis=1) if failed.sum() >= _NO_ACCIDENT else told


def conditions_of(space: Space, history: History) -> tuple[Condition, ...]:
    """What completed trials show of which parameters are used when."""
    if history.asked.all():
        return ()
    told = history.scored & ~history.pruned
    if history.asked[told].all():
        return ()
    discrete = np.array([dimension.n_levels is not None for dimension in space.dimensions])
    return learn_conditions(history.points[told], history.asked[told], discrete)


def units_of(
    history: History, trials: Trials, directions: Sequence[StudyDirection]
) -> tuple[float, float] | None:
    """Offset and scale from standardised scores to the objective's values.

    The two best different scores tell: it is only the bad ones that standardising draws in.
    ``None`` with several objectives, or without two different scores. The history is the one that
    was observed.
    """
    if len(directions) > 1:
        return None
    score = history.scores[~history.running, 0]
    scale = unit(score, trials.net, trials.failed)
    if scale is None:
        return None
    sign = 1.0 if directions[0] == StudyDirection.MAXIMIZE else -1.0
    best = int(np.where(trials.failed, -math.inf, trials.net).argmax())
    return sign * float(score[best] - scale * trials.net[best]), sign * scale


def objective_weights(n_objectives: int, generator: torch.Generator) -> np.ndarray:
    """Random weights, uniform over the simplex, so that proposals spread over the front."""
    if n_objectives == 1:
        return np.ones(1)
    gamma = -torch.rand(n_objectives, generator=generator, dtype=torch.float64).log()
    weights: np.ndarray = (gamma / gamma.sum()).numpy()
    return weights


def observe(
    history: History,
    default: np.ndarray,
    n_trials: int | None,
    weights: np.ndarray,
) -> Trials:
    """The history as the policy takes it: no NaN, one score a trial."""
    points = np.where(np.isnan(history.points), default, history.points)
    running = np.flatnonzero(history.running)[-_MAX_PENDING:]
    finished = ~history.running
    good = history.scored[finished]
    scores = np.zeros(len(good))
    if len(weights) == 1:
        scores[good] = history.scores[finished, 0][good]
    else:
        scores[good] = scalarise(history.scores[finished][good], weights)
    return Trials(
        x=points[finished],
        y=standardise(scores, ~good),
        failed=~good,
        infeasible=history.violation[finished] > 0,
        pending=points[running],
        horizon=n_trials or 0,
    )


def before_costs(history: History, costs: np.ndarray) -> History:
    """The history with the quality of trials as their scores, before costs (n,) were taken."""
    return replace(history, scores=history.scores + costs[:, None])


def charge_of(trials: Trials, quality: History, costs: Costs, points: np.ndarray) -> Costs:
    """What points are charged in units of the trials' ``y``; the trials get to know theirs.

    Args:
        trials: as observed from ``quality``.
        quality: the history before costs were taken.
        costs: of points.
        points: of the space, shape (N, D), over which the costs differ by ``_SPREAD`` units as
            long as no two different scores tell.
    """
    finished = ~quality.running
    worth = unit(quality.scores[finished, 0], trials.y, trials.failed)
    if worth is None:
        worth = max(float(np.ptp(costs(points))), 1e-12) / _SPREAD
    trials.charged = costs(quality.points[finished]) / worth
    return lambda x: costs(x) / worth


def recent_and_best(history: History, after: int | None = None) -> History:
    """At most ``_MAX_TRIALS`` finished trials: the best (by mean rank) and the most recent.

    Running trials stay; so a proposal's cost does not grow with the study.

    Args:
        history: of any length.
        after: the study as it was after so many finished trials, with none running.
    """
    finished, running = np.flatnonzero(~history.running), np.flatnonzero(history.running)
    if after is not None:
        finished, running = finished[:after], running[:0]
    if len(finished) <= _MAX_TRIALS:
        return history if after is None else history.select(finished)
    scores = history.scores[finished]
    scores = np.where(np.isnan(scores), -math.inf, scores)
    ranks = scores[:, 0]
    if scores.shape[1] > 1:
        ranks = scores.argsort(axis=0).argsort(axis=0).sum(axis=1).astype(float)
    ranks = np.where(history.violation[finished] > 0, -math.inf, ranks)
    best = finished[_highest(ranks, _MAX_TRIALS * 2 // 3)]
    recent = finished[-(_MAX_TRIALS // 3) :]
    return history.select(np.union1d(np.union1d(best, recent), running))


def _highest(ranks: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` highest, of equal ones the first; without sorting all of them."""
    limit = -np.partition(-ranks, count - 1)[count - 1]
    above = np.flatnonzero(ranks > limit)
    return np.concatenate([above, np.flatnonzero(ranks == limit)[: count - len(above)]])
