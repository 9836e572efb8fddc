"""A posterior over the response surfaces that a LoRA study may have.

Notations
    M, N, n   surfaces, points, finished trials with a score
    B, P      spans; pairs of a surface and a span, drawn by their weights
    f         surfaces, 0 at the median of their space and 1 at its best, shape (M, N)
    y         standardised scores, shape (n,)
    a, b      offset and span: y = a + b (f(x) + e(x) + noise)
    e         what no surface explains: a Matérn 5/2 process, the same one for all of them
    K         covariance of e at the trials, noise included, shape (n, n)
    r         residuals y / b - f, shape (M, B, n)

The surfaces are drawn once a space, from what is known of LoRA runs before any result: half of
them from fits of this form to the measured tables of the training split, half broader. A range is
evidence: two writers in three draw it round the best learning rate, the others round the guides'.
What the space does not tune stands at its usual value.

Results weigh surfaces and spans. The offset is flat and integrated out, log b is even:

    log p(y | f, b) = -1/2 (log |K| + log 1'K^-1 1 + r'K^-1 r - (1'K^-1 r)^2 / 1'K^-1 1)
                      - (n - 1) log b

(Rasmussen & Williams 2006, eq. 2.45 with a constant as basis, up to a constant). The same with
f = 0 and a wider e is a study that knows no roles; the two likelihoods say how far the bank is
believed against the plain process. Far below the median a surface says "far" and not how far:
values of f end at ``_FLOOR``, and so do those of y / b at the same depth below the best.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_lora_rl.policy.lora_surfaces import draw_shapes
from optuna_lora_rl.policy.lora_surfaces import natural_values
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.prior import U
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scaling import Normal

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna_lora_rl.policy.candidates import Trials
    from optuna_lora_rl.policy.layout import Layout
    from optuna_lora_rl.policy.layout import Points

# Surfaces and pairs; even and random points of a space that normalise its surfaces.
SURFACES, _PAIRS, _NET = 2000, 256, 192
# A surface whose best is so little above its median knows nothing of its space, and a bank of so
# few others does not speak.
_LEAST_SPAN, _FEWEST = 0.02, 200
_FLOOR = -1.5
# Deviations of e, of the noise, and of e where no roles are known.
_DEVIATION, _NOISE, _PLAIN = 0.25, 0.07, 1.0
# Odds of the bank against the plain process before any result.
_ODDS = 9.0
# Spans b, in units of the range of the scores.
_SPANS = np.exp(np.linspace(math.log(0.2), math.log(12.0), 12))
# The guides' preference for what is not the learning rate counts in full before any trial, and
# has lost most of its weight after so many.
_GUIDED_TRIALS = 4.0
_RATE = ROLES.index("learning_rate")


class Bank:
    """Surfaces that a study of a space may have.

    Args:
        layout: of the space.
        count: of surfaces that are drawn; pairs are as few in proportion.

    Attributes:
        pairs: of a surface and a span that a posterior draws.
        shapes: of the surfaces that tell places of the space apart.
        rates: log10 of the learning rate that is best at the guides' values of the rest, (M,).
        speaks: whether there are enough of them.
    """

    def __init__(self, layout: Layout, count: int = SURFACES) -> None:
        rng, self.pairs = np.random.default_rng(0), _PAIRS * count // SURFACES
        shapes = draw_shapes(rng, layout, count)
        net = np.concatenate([rng.random((_NET, len(layout))), layout.default[None], layout.sweep])
        value = shapes(natural_values(layout.points(net), layout))
        median, best = np.median(value[:, :_NET], 1), value.max(1)
        kept = np.flatnonzero(best - median > _LEAST_SPAN)
        self.layout, self.shapes, self.speaks = layout, shapes.take(kept), len(kept) >= _FEWEST
        self.rates = (
            self.shapes.peak - self.shapes.lift(natural_values(layout.usual, layout))[:, 0]
        )
        self._median, self._span = median[kept, None], (best - median)[kept, None]
        self._length = np.exp(layout.log_l[:, 0])

    def values(self, points: Points, rows: np.ndarray | None = None) -> np.ndarray:
        """Normalised values of all surfaces or of those in ``rows``, shape (M, N)."""
        shapes, median, span = self.shapes, self._median, self._span
        if rows is not None:
            shapes, median, span = shapes.take(rows), median[rows], span[rows]
        f = shapes(natural_values(points, self.layout))
        f -= median
        f /= span
        return np.maximum(f, _FLOOR, out=f)

    def at_best_rate(self, point: np.ndarray) -> np.ndarray:
        """A point, shape (D,), at the learning rate that is best on average before any result.

        What lies more than a span below the median counts as no worse than that.
        """
        column = self.layout.column[_RATE]
        if column < 0 or not self.speaks:
            return point
        x = np.repeat(point[None], NODES, axis=0)
        x[:, column] = U
        worth = np.maximum(self.values(self.layout.points(x)), -1.0).mean(0)
        best: np.ndarray = x[int(worth.argmax())]
        return best

    def covariance(self, X: np.ndarray, x: np.ndarray, deviation: float) -> np.ndarray:
        """Of e at coordinates X (n, D) and x (N, D), shape (n, N)."""
        gap = (X[:, None, :] - x) / self._length
        r = np.sqrt(5.0 * np.square(gap).sum(-1))
        k: np.ndarray = deviation**2 * (1.0 + r + r * r / 3.0) * np.exp(-r)
        return k

    def log_likelihood(self, X: np.ndarray, r: np.ndarray, deviation: float) -> np.ndarray:
        """Of residuals r (..., n) at coordinates X, the offset integrated out, shape (...,)."""
        K = self.covariance(X, X, deviation) + _NOISE**2 * np.eye(len(X))
        inverse = np.linalg.inv(np.linalg.cholesky(K))
        one, white = inverse.sum(1), r @ inverse.T
        ones = float(one @ one)
        distance = np.square(white).sum(-1) - np.square(white @ one) / ones
        constant = float(np.log(np.diag(inverse)).sum()) - 0.5 * math.log(ones)
        found: np.ndarray = constant - 0.5 * distance
        return found

    def rest_prior(self, points: Points) -> np.ndarray:
        """log-density of the guides' prior of all but the learning rate, shape (N,)."""
        column = self.layout.column[_RATE]
        if column < 0:
            return points.log_prior
        rate = np.interp(points.x[:, column], U, self.layout.log_density[column])
        return points.log_prior - rate


class Posterior:
    """The bank as the trials of a study leave it.

    Args:
        bank: of the space.
        trials: of the study.
        charge: what is known to be taken from the scores of points x (N, D), in units of y.

    Attributes:
        weights: of surfaces and spans, shape (M, B), summing to 1.
        share: how far the bank is believed against the plain process, from 0 to 1.
        effective: log of the effective number of surfaces, 1 where all count alike.
        peak: log10 of the best learning rate at the guides' values of the rest.
        spans: of the pairs, shape (P,).
        free: probability that nothing is charged for an adapter's size or a run's length.
    """

    def __init__(
        self,
        bank: Bank,
        trials: Trials,
        charge: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._bank, self._charge = bank, charge
        self._guided = (1.0 + len(trials) / _GUIDED_TRIALS) ** -2
        seen = trials.points(bank.layout)
        f = bank.values(seen).astype(float)
        log_w = _survival(f[:, trials.failed])
        told = ~trials.failed
        X, y, f = seen.coordinates[told], trials.y[told], f[:, told]
        b = max(float(np.ptp(y)) if len(y) else 0.0, 1e-9) * _SPANS
        if len(y) < 2:  # a single score says nothing, its offset being unknown
            b = np.ones(1)
        r = _residuals(y, f, b)
        plain = np.zeros(1)
        log_l = np.tile(log_w[:, None], len(b))
        if len(y) >= 2:
            log_b = (len(y) - 1) * np.log(b)
            log_l += bank.log_likelihood(X, r, _DEVIATION) - log_b
            plain = bank.log_likelihood(X, y / b[:, None], _PLAIN) - log_b
        w = np.exp(log_l - log_l.max())
        odds = math.log(_ODDS) + _log_mean(log_l) - _log_mean(plain)
        self.share = 1.0 / (1.0 + math.exp(-min(max(odds, -50.0), 50.0)))
        self.weights = w / w.sum()
        each = self.weights.sum(1)
        self.effective = -math.log(float(np.square(each).sum())) / math.log(max(len(each), 2))
        mean = float(each @ bank.rates)
        self.peak = Normal(mean, math.sqrt(float(each @ np.square(bank.rates - mean))))
        costless = (bank.shapes.cost <= 0) & (bank.shapes.compute <= 0)
        self.free = float(each[costless].sum())
        self._rows, spans = _resample(self.weights, bank.pairs)
        self.spans = b[spans]
        self._condition(X, f[self._rows], r[self._rows, spans], trials)

    def _condition(self, X: np.ndarray, f: np.ndarray, r: np.ndarray, trials: Trials) -> None:
        """e given the residuals r (P, n) of the pairs at X, where the surfaces are f (P, n).

        A running trial is taken to end where a pair expects it.
        """
        bank, pending = self._bank, self._bank.layout.points(trials.pending)
        K = bank.covariance(X, X, _DEVIATION)
        inverse = np.linalg.inv(K + _NOISE**2 * np.eye(len(X)))
        one = inverse.sum(1)
        offset = (r @ one)[:, None] / max(float(one.sum()), 1e-12)
        alpha = (r - offset) @ inverse
        at = f + alpha @ K
        good = trials.good[~trials.failed]
        if trials.charged is not None:
            at = at - trials.charged[~trials.failed] / self.spans[:, None]
        best = at[:, good].max(1, initial=-math.inf)
        if len(X) and not good.any():
            best = at.min(1) - 1.0
        if len(pending):
            ahead = bank.values(pending, self._rows).astype(float)
            ahead += alpha @ bank.covariance(X, pending.coordinates, _DEVIATION)
            if self._charge:
                ahead -= self._charge(pending.x) / self.spans[:, None]
            best = np.maximum(best, ahead.max(1))
            X = np.concatenate([X, pending.coordinates])
            alpha = np.concatenate([alpha, np.zeros((bank.pairs, len(pending)))], 1)
        K = bank.covariance(X, X, _DEVIATION) + _NOISE**2 * np.eye(len(X))
        self._X, self._inverse = X, np.linalg.inv(np.linalg.cholesky(K))
        self._alpha, self._best = alpha.astype(np.float32), best.astype(np.float32)[:, None]

    def judge(
        self, points: Points, charged: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """log of the expected improvement in units of y, (N,), and by how much each pair expects
        a point to beat its incumbent, in spans, (N, P).

        The guides' preference for all but the learning rate joins the first, and fades. What is
        charged of each point, shape (N,), in units of y, is taken from what the surfaces say.
        """
        from scipy.special import ndtr  # slow to import

        guided = self._guided * self._bank.rest_prior(points)
        f = self._bank.values(points, self._rows)
        if charged is not None:
            f -= (charged / self.spans[:, None]).astype(np.float32)
        if not len(self._X):  # nothing to improve on, but failures
            return guided + 20.0 * np.log(np.maximum(f, -1.0).mean(0) + 1.05), f.T
        k = self._bank.covariance(self._X, points.coordinates, _DEVIATION)
        explained = np.square(self._inverse @ k).sum(0)
        s = np.sqrt(np.maximum(_DEVIATION**2 - explained, 1e-5)).astype(np.float32)
        f += self._alpha @ k.astype(np.float32)
        f -= self._best
        levels = f.T.copy()
        f /= s
        gain = f * ndtr(f)
        gain += np.exp(-0.5 * f * f) * np.float32(1.0 / math.sqrt(2.0 * math.pi))
        gain *= s
        return np.asarray(guided + np.log(self.spans @ gain / self._bank.pairs + 1e-12)), levels


def _survival(f: np.ndarray) -> np.ndarray:
    """log-likelihood of failures at values f (M, n) up to a constant, mean 1, shape (M,).

    A run fails for its configuration where the surface is about a span below its median, and for
    another reason once in twenty.
    """
    log_w = np.log(0.05 + 0.95 / (1.0 + np.exp((f + 1.0) / 0.25))).sum(1)
    return np.asarray(log_w - _log_mean(log_w))


def _residuals(y: np.ndarray, f: np.ndarray, b: np.ndarray) -> np.ndarray:
    """y / b - f with a common floor, shape (M, B, n)."""
    z = (y / b[:, None])[None]
    if len(y):
        top = int(y.argmax())
        z = np.maximum(z, z[..., [top]] - (f[:, None, [top]] - _FLOOR))
    return np.asarray(z - f[:, None])


def _log_mean(log_values: np.ndarray) -> float:
    top = float(log_values.max())
    return top + math.log(float(np.exp(log_values - top).mean()))


def _resample(weights: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Systematic draws of rows and columns by their weights, (P,) each."""
    even = (np.arange(pairs) + 0.5) / pairs
    drawn = np.searchsorted(np.cumsum(weights), even).clip(0, weights.size - 1)
    return np.divmod(drawn, weights.shape[1])
