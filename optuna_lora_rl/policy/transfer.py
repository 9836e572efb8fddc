"""What earlier studies say about a new one: a mean that the surrogate starts from.

Notations
    K, n, D   sources, finished trials of the target, columns
    z         model coordinates of points, shape (N, D)
    m_i       posterior mean of source i's process, standardised scores of that source
    w_i       how far source i is believed, at least 0, trust = sum of w_i at most 1
    a         what a standardised unit of the sources is worth in the target
    kappa     deviation that is left to the target's own process, shape (N,)

Each source gets one Gaussian process, fitted once, in the target's coordinates. The target's
surrogate is a process round the sources' opinion,

    f(z) = trust * a * (m(z) - mean of m over the target's trials) + kappa(z) g(z),
    m = sum w_i m_i / trust,

where g is fitted as without transfer. With trust 0 it is the surrogate without transfer.

Weights are by rank, as in the ranking-weighted ensemble of Feurer, Letham & Bakshy (2018):
a source is weighed by how often, over bootstrap samples of the target's trials, it orders them
better than the other sources, than the target's own process leaving each trial out, and than a
coin. The coin and the target's own process are what dilutes a misleading source away.

Sources that point at a plateau would never be refuted by trials on it. So single trials are
proposed as without transfer, until one has been made where the sources expect clearly less.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.matching import place
from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import evenly
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.policy.surrogate import incumbent

MIN_TRIALS = 3
_MAX_ROWS = 120
_BEST = 5
_SAMPLES = 200
_MAX_RANKED = 40
# Evidence for a source before any result, in pairs told apart, and its share of misranked ones.
_PRIOR_PAIRS, _PRIOR_LOSS = 0.5, 0.25
# Numbers of trials (running ones count) after which an untested opinion is put to the test by a
# trial without transfer; tested is what has seen a trial expected so many deviations lower.
_TESTS, _CLEARLY_LESS = (1, 3, 6, 10, 15), 1.0
# Regression of the target's scores on the sources' opinion: pseudo-observations of a slope of 1.
_SLOPE_WEIGHT, _MAX_SLOPE = 0.5, 3.0
# Share of the target's variance that a fully trusted source explains.
_EXPLAINED = 0.75


@dataclass(frozen=True, eq=False)
class SourceStudy:
    """An earlier study, as plain values.

    Args:
        name: for messages.
        space: its parameters, with their roles.
        params: configurations of its finished trials.
        scores: larger is better, shape (n, m); NaN where a trial has none.
        bad: trials that failed or broke a constraint, shape (n,).
    """

    name: str
    space: Space
    params: tuple[Mapping[str, Any], ...]
    scores: np.ndarray
    bad: np.ndarray

    @property
    def results(self) -> int:
        """How many trials have a result that counts."""
        return int((~self.bad & ~np.isnan(self.scores).any(axis=1)).sum())


@dataclass
class SourceModel:
    """One source's process in the target's coordinates.

    Args:
        process: fitted to the source's trials.
        shared: columns that the source knows, shape (D,).
        best: its best configurations, shape (k, D), what it does not know at the default.
    """

    process: Process
    shared: np.ndarray
    best: np.ndarray

    def posterior(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, each (N,), the latter relative to what is unknown everywhere."""
        mean, deviation = self.process.posterior(np.where(self.shared, z, 0.5))
        return mean, np.minimum(deviation / np.sqrt(self.process.s), 1.0)


def fit_source(
    layout: Layout, space: Space, source: SourceStudy, weights: np.ndarray
) -> SourceModel | None:
    """Fit one source's process; ``None`` where it says nothing about this space.

    Args:
        layout: of the target.
        space: of the target.
        source: the earlier study.
        weights: of the target's objectives; used where the source has as many.
    """
    points, shared = place(space, source.space, source.params)
    good = ~source.bad & ~np.isnan(source.scores).any(axis=1)
    if good.sum() < MIN_TRIALS or not shared.any():
        return None
    scores = np.zeros(len(good))
    m = source.scores.shape[1]
    even = np.full(m, 1.0 / m)
    scores[good] = (
        source.scores[good, 0]
        if m == 1
        else scalarise(source.scores[good], weights if len(weights) == m else even)
    )
    rows = _representative(np.where(good, scores, -np.inf))
    points, scores, good = points[rows], scores[rows], good[rows]
    x = np.where(np.isnan(points), layout.default, points)
    y = standardise(scores, ~good)
    X, extra = np.where(shared, layout.points(x).coordinates, 0.5), np.where(good, 0.0, 0.05)
    theta = fit_theta(
        X, y, layout.unordered, layout.log_l, extra, iterations=40, fit_rows=_MAX_ROWS
    )
    top = x[np.argsort(np.where(good, -y, np.inf), kind="stable")[:_BEST]]
    inside = shared & ~(layout.unordered & (top < 0))
    best = np.where(inside, np.clip(top, 0.0, 1.0), layout.default)
    return SourceModel(Process(X, y, layout.unordered, theta, extra), shared, best)


def _representative(scores: np.ndarray) -> np.ndarray:
    """At most ``_MAX_ROWS`` rows: the better half of them the best, the rest evenly spread."""
    if len(scores) <= _MAX_ROWS:
        return np.arange(len(scores))
    order = np.argsort(-scores, kind="stable")
    half = _MAX_ROWS // 2
    rest = np.linspace(half, len(scores) - 1, _MAX_ROWS - half).round().astype(int)
    return np.sort(order[np.concatenate([np.arange(half), rest])])


@dataclass
class Opinion:
    """What the sources say, as far as the target's results let them be believed.

    Args:
        models: of the sources.
        weights: w, shape (K,).
        slope: a.
        centre: mean of m over the target's trials.
    """

    models: Sequence[SourceModel]
    weights: np.ndarray
    slope: float = 1.0
    centre: float = 0.0

    @property
    def trust(self) -> float:
        """From 0 (the sources mislead) to 1."""
        return float(self.weights.sum())

    def __call__(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The target's expected score and kappa at z, each (N,); see the module's notations.

        kappa is 1 where the sources know nothing or are not believed.
        """
        total, explained = np.zeros(len(z)), np.zeros(len(z))
        for weight, model in zip(self.weights.tolist(), self.models, strict=True):
            if weight > 0:
                mean, deviation = model.posterior(z)
                total += weight * (mean - self.centre)
                explained += weight * (1.0 - np.square(deviation))
        return self.slope * total, np.sqrt(1.0 - _EXPLAINED * explained)

    def residual(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The scores y at z as the target's own process g sees them, shape (n,)."""
        mean, kappa = self(z)
        return (y - mean) / kappa


@dataclass
class Informed:
    """The surrogate f that g, fitted to the residuals, makes with an opinion."""

    process: Process
    opinion: Opinion

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the noise-free score at coordinates x, (N,) each."""
        mean, deviation = self.process.posterior(x)
        expected, kappa = self.opinion(x)
        return expected + kappa * mean, kappa * deviation

    def incumbent(self, eligible: np.ndarray, charged: np.ndarray | float = 0.0) -> float:
        """The best posterior mean, less what is charged, at an eligible observation, (n,) each."""
        expected, kappa = self.opinion(self.process.X)
        return incumbent(expected + kappa * self.process.at_trials - charged, eligible)

    def believe(self, x: np.ndarray) -> Informed:
        """Conditioned also on running trials x (m, D), taken to end at their predicted mean."""
        return Informed(self.process.believe(x), self.opinion)


def weigh(models: Sequence[SourceModel], layout: Layout, trials: Trials) -> Opinion:
    """Judge the sources by the target's finished trials."""
    K, y = len(models), trials.y
    begun = len(trials) + len(trials.pending)
    if not len(trials):
        return Opinion(models, np.full(K, 0.0 if begun in _TESTS else 1.0 / K))
    z = trials.points(layout).coordinates
    means = np.stack([model.posterior(z)[0] for model in models])
    theta = fit_theta(
        z, y, layout.unordered, layout.log_l, np.zeros(len(y)), iterations=20, fit_rows=40
    )
    own = Process(z, y, layout.unordered, theta, np.zeros(len(y))).leave_one_out()
    weights = _ranking_weights(means, y, own, trials.failed)
    m = weights @ means / max(float(weights.sum()), 1e-12)
    if begun in _TESTS and m.max() - m.min() < _CLEARLY_LESS:
        weights = np.zeros(K)
    centre = m.mean()
    slope = ((m - centre) @ (y - y.mean()) + _SLOPE_WEIGHT) / (
        np.square(m - centre).sum() + _SLOPE_WEIGHT
    )
    return Opinion(models, weights, float(np.clip(slope, 0.0, _MAX_SLOPE)), float(centre))


def _ranking_weights(
    means: np.ndarray, y: np.ndarray, own: np.ndarray, failed: np.ndarray
) -> np.ndarray:
    """How often each source orders the trials best, shape (K,).

    Args:
        means: the sources' opinions at the trials, shape (K, n).
        y: the trials' scores, shape (n,).
        own: the target's own leave-one-out predictions, shape (n,).
        failed: trials without a score of their own, shape (n,).
    """
    rows = evenly(len(y), _MAX_RANKED)
    means, y, own, failed = means[:, rows], y[rows], own[rows], failed[rows]
    generator = torch.Generator().manual_seed(len(rows))
    draw = torch.randint(len(rows), (_SAMPLES, len(rows)), generator=generator).numpy()
    counts = (draw[:, :, None] == np.arange(len(rows))).sum(1).astype(float)
    source = np.stack([_misranked(m, y, failed, counts, _PRIOR_LOSS) for m in means], 1)
    # Before it has many trials, leaving one out predicts the opposite: no worse than a coin.
    rival = np.minimum(_misranked(own, y, failed, counts, 0.5), 0.5)
    best = source.min(1, keepdims=True)
    winners = (source <= best + 1e-9) & (best < rival[:, None])
    share: np.ndarray = (winners / np.maximum(winners.sum(1, keepdims=True), 1)).mean(0)
    return share


def _misranked(
    prediction: np.ndarray, y: np.ndarray, failed: np.ndarray, counts: np.ndarray, prior: float
) -> np.ndarray:
    """Share of the pairs in the wrong order, by bootstrap sample, shape (S,).

    A pair counts by how far apart the prediction puts it (at most one deviation): whoever sees
    no difference is neither right nor wrong. A failed trial also makes a pair with the average
    configuration, prediction 0: else sources that only lead to failures would never be wrong.

    Args:
        prediction: at the trials, shape (n,).
        y: scores, shape (n,).
        failed: shape (n,).
        counts: how often each trial is in each sample, shape (S, n).
        prior: the share to begin with.
    """
    gap = prediction[:, None] - prediction[None, :]
    said = np.minimum(np.abs(gap), 1.0) * (y[:, None] != y[None, :])
    wrong = said * (np.sign(gap) != np.sign(y[:, None] - y[None, :]))
    over = np.clip(prediction, -1.0, 1.0) * failed
    evidence = _in_pairs(said, counts) + counts @ np.abs(over)
    against = _in_pairs(wrong, counts) + counts @ np.maximum(over, 0.0)
    return (against + _PRIOR_PAIRS * prior) / (evidence + _PRIOR_PAIRS)


def _in_pairs(weight: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum over a sample's pairs, shape (S,)."""
    total: np.ndarray = 0.5 * ((counts @ weight) * counts).sum(1)
    return total
