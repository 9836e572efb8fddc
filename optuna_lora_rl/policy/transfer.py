"""What earlier studies say about a new one: a mean that the surrogate starts from.

Notations
    K, n, D   sources, finished trials of the target, columns
    z         model coordinates of points, shape (1, N, D)
    m_i       posterior mean of source i's process, standardised scores of that source
    w_i       how far source i is believed, at least 0, trust = sum of w_i at most 1
    a         what a standardised unit of the sources is worth in the target
    kappa     deviation that is left to the target's own process, shape (1, N)

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
from torch import Tensor

from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.matching import place
from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Surrogate
from optuna_lora_rl.policy.surrogate import fit

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
        surrogate: fitted to the source's trials.
        shared: columns that the source knows, shape (D,).
        best: its best configurations, shape (k, D), what it does not know at the default.
    """

    surrogate: Surrogate
    shared: Tensor
    best: Tensor

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, each (1, N), the latter relative to what is unknown everywhere."""
        mean, deviation = self.surrogate.posterior(_only(z, self.shared))
        scale = (0.5 * self.surrogate.log_s).exp()[:, None]
        return mean, (deviation / scale).clamp_max(1.0)


def _only(z: Tensor, shared: Tensor) -> Tensor:
    return torch.where(shared, z, torch.full_like(z, 0.5))


def fit_source(
    layout: Layout, space: Space, source: SourceStudy, weights: np.ndarray
) -> SourceModel | None:
    """Fit one source's process; ``None`` where it says nothing about this space.

    Args:
        layout: of the target (a batch of one).
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
    x = torch.from_numpy(np.where(np.isnan(points), layout.default.numpy(), points))[None]
    ok = torch.from_numpy(good)[None]
    known = torch.from_numpy(shared)
    y = standardise(torch.from_numpy(scores)[None], ok, ~ok)
    surrogate = fit(
        _only(layout.model_coordinates(x), known),
        y,
        torch.ones_like(ok),
        layout.unordered,
        layout.lengthscales(),
        extra=torch.where(ok, 0.0, 0.05).double(),
    )
    top = x[0, torch.where(ok, y, -torch.inf)[0].argsort(descending=True, stable=True)[:_BEST]]
    inside = known & ~(layout.unordered[0] & (top < 0))
    best = torch.where(inside, top.clamp(0.0, 1.0), layout.default)
    return SourceModel(surrogate, known, best)


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
    weights: Tensor
    slope: float = 1.0
    centre: float = 0.0

    @property
    def trust(self) -> float:
        """From 0 (the sources mislead) to 1."""
        return float(self.weights.sum())

    def mean(self, z: Tensor) -> Tensor:
        """The target's expected score at z, shape (1, N)."""
        total = torch.zeros(z.shape[:2], dtype=z.dtype)
        for weight, model in zip(self.weights.tolist(), self.models, strict=True):
            if weight > 0:
                total = total + weight * (model.posterior(z)[0] - self.centre)
        return self.slope * total

    def kappa(self, z: Tensor) -> Tensor:
        """See the module's notations: 1 where the sources know nothing or are not believed."""
        explained = torch.zeros(z.shape[:2], dtype=z.dtype)
        for weight, model in zip(self.weights.tolist(), self.models, strict=True):
            if weight > 0:
                explained = explained + weight * (1.0 - model.posterior(z)[1].square())
        return (1.0 - _EXPLAINED * explained).sqrt()

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """The scores y at z as the target's own process g sees them, shape (1, n)."""
        return (y - self.mean(z)) / self.kappa(z)

    def informed(self, surrogate: Surrogate) -> Surrogate:
        """The surrogate f that g, fitted to the residuals, makes with this opinion."""
        fields = {name: getattr(surrogate, name) for name in Surrogate.__dataclass_fields__}
        return _Informed(**fields, opinion=self)


@dataclass
class _Informed(Surrogate):
    opinion: Opinion

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().posterior(x)
        kappa = self.opinion.kappa(x)
        return self.opinion.mean(x) + kappa * mean, kappa * deviation


def weigh(models: Sequence[SourceModel], layout: Layout, observed: Observed) -> Opinion:
    """Judge the sources by the target's finished trials (a batch of one)."""
    K = len(models)
    mask = observed.mask[0]
    begun = int(mask.sum() + observed.pending_mask.sum())
    if not bool(mask.any()):
        even = torch.full((K,), 1.0 / K, dtype=torch.float64)
        return Opinion(models, torch.zeros_like(even) if begun in _TESTS else even)
    z = layout.model_coordinates(observed.x)[:, mask]
    y = observed.y[0, mask]
    means = torch.stack([model.posterior(z)[0][0] for model in models])
    own = _leave_one_out(layout, z, y)
    weights = _ranking_weights(means, y, own, observed.failed[0, mask])
    trust = weights.sum().clamp_min(1e-12)
    m = (weights[:, None] * means).sum(0) / trust
    if begun in _TESTS and float(m.max() - m.min()) < _CLEARLY_LESS:
        weights = torch.zeros_like(weights)
    centre = m.mean()
    slope = ((m - centre) @ (y - y.mean()) + _SLOPE_WEIGHT) / (
        (m - centre).square().sum() + _SLOPE_WEIGHT
    )
    return Opinion(models, weights, float(slope.clamp(0.0, _MAX_SLOPE)), float(centre))


def _leave_one_out(layout: Layout, z: Tensor, y: Tensor) -> Tensor:
    """Each trial's score as a process fitted to the target predicts it from the others, (n,).

    Rasmussen & Williams 2006, eq. 5.12, with hyperparameters fitted to all.
    """
    ones = torch.ones((1, len(y)), dtype=torch.bool)
    own = fit(
        z, y[None], ones, layout.unordered, layout.lengthscales(), iterations=20, fit_rows=40
    )
    precision = torch.cholesky_inverse(own.L[0]).diagonal()
    return y - own.alpha[0] / precision


def _ranking_weights(means: Tensor, y: Tensor, own: Tensor, failed: Tensor) -> Tensor:
    """How often each source orders the trials best, shape (K,).

    Args:
        means: the sources' opinions at the trials, shape (K, n).
        y: the trials' scores, shape (n,).
        own: the target's own leave-one-out predictions, shape (n,).
        failed: trials without a score of their own, shape (n,).
    """
    n = len(y)
    rows = torch.linspace(0, n - 1, min(n, _MAX_RANKED)).round().long()
    means, y, own, failed = means[:, rows], y[rows], own[rows], failed[rows]
    generator = torch.Generator().manual_seed(len(rows))
    draw = torch.randint(len(rows), (_SAMPLES, len(rows)), generator=generator)
    counts = torch.nn.functional.one_hot(draw, len(rows)).sum(1).double()
    source = torch.stack([_misranked(m, y, failed, counts, _PRIOR_LOSS) for m in means], 1)
    # Before it has many trials, leaving one out predicts the opposite: no worse than a coin.
    rival = _misranked(own, y, failed, counts, 0.5).clamp_max(0.5)
    best = source.amin(1, keepdim=True)
    winners = (source <= best + 1e-9) & (best < rival[:, None])
    return (winners / winners.sum(1, keepdim=True).clamp_min(1)).mean(0)


def _misranked(
    prediction: Tensor, y: Tensor, failed: Tensor, counts: Tensor, prior: float
) -> Tensor:
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
    said = gap.abs().clamp_max(1.0) * (y[:, None] != y[None, :])
    wrong = said * (gap.sign() != (y[:, None] - y[None, :]).sign())
    over = prediction.clamp(-1.0, 1.0) * failed
    evidence = _in_pairs(said, counts) + counts @ over.abs()
    against = _in_pairs(wrong, counts) + counts @ over.clamp_min(0.0)
    return (against + _PRIOR_PAIRS * prior) / (evidence + _PRIOR_PAIRS)


def _in_pairs(weight: Tensor, counts: Tensor) -> Tensor:
    """Sum over a sample's pairs, shape (S,)."""
    return 0.5 * ((counts @ weight) * counts).sum(1)
