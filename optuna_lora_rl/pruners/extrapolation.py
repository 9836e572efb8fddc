"""Learning curves as power laws: how noisy they are, and where they will end.

Knows nothing of studies and trials. A curve falls short of its end as a power of the time left
behind (Hestness et al. 2017, arXiv 1712.00409; Domhan, Springenberg and Hutter 2015, IJCAI,
extrapolate by a weighted ensemble of such families; LC-PFN, Adriaensen et al. 2023, arXiv
2310.20447, learn the prior from many curves). Here the ensemble runs over the exponent, each
member is a Bayesian linear regression in closed form, and its prior is that of the study's own
finished curves.

Notations
---------
t    (S,)    steps, the last one being where every curve ends
y    (N, S)  curves, larger is better; NaN where there is no report
c    (C,)    exponents of the ensemble
x    (C, S)  (t / t_last)^-c - 1: falls to 0 at the last step
f    (N, C)  end of the curve, y(t_last), under each exponent
b    (N, C)  height of what is still to be climbed: y(t) = f - b x(t) + noise
w    (N, C)  weight of each exponent for each curve; rows sum to 1

>>> t = np.arange(1.0, 9.0)
>>> finished = 0.9 - np.linspace(0.2, 0.6, 5)[:, None] * t**-0.75
>>> curve = 0.8 - 0.4 * t**-0.75
>>> seen = np.where(t <= 3, curve, np.nan)[None, :]
>>> end = extrapolate(t, seen, finished, noise=1e-3)
>>> bool(abs(end.mean[0] - curve[-1]) < 2e-3)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace

import numpy as np

# From logarithmic growth to curves that are flat after a few steps.
EXPONENTS = np.array([0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])
# A curve has three parameters: its end, its height and its exponent.
_PARAMETERS = 3
# How many curves the vague prior counts for, next to the finished ones.
_VAGUE = 2.0


@dataclass(frozen=True)
class Fit:
    """Least squares fits of many curves, one for each exponent.

    Attributes:
        end: f, shape (N, C); NaN where a curve has less than two points.
        height: b, shape (N, C).
        error: Sum of squared residuals, shape (N, C).
        points: Points of each curve, shape (N,).
    """

    end: np.ndarray
    height: np.ndarray
    error: np.ndarray
    points: np.ndarray

    def noise(self) -> np.ndarray:
        """Standard deviation of each curve's residuals, shape (N,); NaN for less than 4 points.

        The median of a chi-squared variable takes the place of its mean, so that the median over
        many curves is unbiased.
        """
        # Takes longer to import than naming a pruner should.
        from scipy.stats import chi2

        freedom = self.points - _PARAMETERS
        enough = freedom > 0
        noise = np.full(len(self.points), np.nan)
        least = self.error[enough].min(axis=1, initial=np.inf)
        noise[enough] = np.sqrt(least / chi2.median(freedom[enough]))
        return noise


@dataclass(frozen=True)
class Ends:
    """Where curves will end: for each a mixture over the exponents.

    Attributes:
        members: Mean of each member, shape (N, C).
        sd: Standard deviation of each member, shape (N, C), of an evaluation at the end.
        weight: w, shape (N, C).
        freedom: Degrees of freedom of the members' Student distributions: how many curves the
            standard deviations were learned from.
    """

    members: np.ndarray
    sd: np.ndarray
    weight: np.ndarray
    freedom: float = math.inf

    @property
    def mean(self) -> np.ndarray:
        """Mean of each mixture, shape (N,)."""
        return (self.weight * self.members).sum(axis=1)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of each mixture, shape (N,)."""
        square = self.sd**2 + self.members**2
        return np.sqrt(np.maximum((self.weight * square).sum(axis=1) - self.mean**2, 0.0))

    def chance(self, target: float, deviation: float = 0.0) -> np.ndarray:
        """Probability that each curve ends at or above a target, shape (N,).

        Args:
            target: The target's mean.
            deviation: Its standard deviation, where it is itself a forecast.
        """
        from scipy.special import stdtr

        with np.errstate(divide="ignore", invalid="ignore"):
            score = (self.members - target) / np.hypot(self.sd, deviation)
        # Where nothing is uncertain, 0 / 0 is a tie.
        return (self.weight * stdtr(self.freedom, np.nan_to_num(score, nan=np.inf))).sum(axis=1)

    def of(self, rows: slice) -> Ends:
        """The ends of some of the curves."""
        return replace(
            self, members=self.members[rows], sd=self.sd[rows], weight=self.weight[rows]
        )

    def recalibrated(self, latest: np.ndarray, kept: float, factor: float, least: float) -> Ends:
        """The same, with ``kept`` of the climb from ``latest`` and ``factor`` of the spread."""
        members = latest[:, None] + kept * (self.members - latest[:, None])
        return Ends(members, np.maximum(self.sd * factor, least), self.weight, self.freedom)


def fit(t: np.ndarray, y: np.ndarray) -> Fit:
    """Fit every curve by least squares, under each exponent.

    Args:
        t: Steps, positive and increasing, shape (S,).
        y: Curves, NaN where there is no report, shape (N, S).
    """
    n, sx, sxx, sy, sxy, syy = _sums(t, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        b = -(n * sxy - sx * sy) / (n * sxx - sx**2)
        f = (sy + b * sx) / n
    f[n[:, 0] < 2], b[n[:, 0] < 2] = np.nan, np.nan
    # Expanded squares cancel: what is below rounding of the largest term is 0.
    error = syy + n * f**2 + b**2 * sxx - 2 * f * sy + 2 * b * sxy - 2 * f * b * sx
    error = np.where(error > 1e-12 * np.maximum(syy, 1e-300), error, 0.0)
    return Fit(end=f, height=b, error=error, points=n[:, 0].astype(int))


def latest(y: np.ndarray) -> np.ndarray:
    """Last report of each curve that has one."""
    there = np.isfinite(y)
    rows = np.flatnonzero(there.any(axis=1))
    return y[rows, y.shape[1] - 1 - np.argmax(there[rows, ::-1], axis=1)]


def extrapolate(t: np.ndarray, y: np.ndarray, finished: np.ndarray, *, noise: float) -> Ends:
    """Say where curves will end.

    Args:
        t: Steps, positive and increasing, shape (S,); curves end at the last.
        y: Curves under way, shape (N, S); at least one report each, none at the last step.
        finished: Curves that have ended, from which the prior is learned, shape (M, S).
        noise: Standard deviation of one evaluation.
    """
    noise = max(noise, 1e-6 * _scale(y, finished))
    prior = _prior(t, y, finished, noise)
    ends = _posterior(t, y, *prior, noise)
    ended = finished[np.isfinite(finished[:, -1])]
    # Curves that have reported at the same steps are recalibrated together.
    patterns, group = np.unique(np.isfinite(y), axis=0, return_inverse=True)
    for number, seen in enumerate(patterns):
        rows = np.flatnonzero(group.reshape(-1) == number)
        kept, factor = _recalibration(t, np.where(seen, ended, np.nan), ended, prior, noise)
        part = Ends(ends.members[rows], ends.sd[rows], ends.weight[rows])
        part = part.recalibrated(latest(y[rows]), kept, factor, noise)
        ends.members[rows], ends.sd[rows] = part.members, part.sd
    return replace(ends, freedom=_VAGUE + len(ended))


def _recalibration(
    t: np.ndarray,
    seen: np.ndarray,
    ended: np.ndarray,
    prior: tuple[np.ndarray, np.ndarray, np.ndarray],
    noise: float,
) -> tuple[float, float]:
    """How well ended curves kept what their first reports promised.

    Power laws do not know that a learning rate schedule flattens the end of a curve; the finished
    curves do. Returns the share of the promised climb that was kept, and the factor of the
    promised uncertainty.
    """
    usable = np.isfinite(seen).any(axis=1)
    seen, ended = seen[usable], ended[usable]
    if not len(ended):
        return 1.0, 1.0
    promise = _posterior(t, seen, *prior, noise)
    promised, climb = promise.mean - latest(seen), ended[:, -1] - latest(seen)
    square = float(promised @ promised)
    vague = _VAGUE * square / len(ended)
    kept = (float(promised @ climb) + vague) / (square + vague) if square > 0 else 1.0
    z = (climb - kept * promised) / promise.deviation
    # The share was fitted to these very curves, and the next one is not among them.
    widening = 1 + 1 / len(ended)
    return kept, widening * float(np.sqrt((z @ z + _VAGUE) / (len(z) + _VAGUE)))


def _prior(
    t: np.ndarray, y: np.ndarray, finished: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (C, 2) and covariance (C, 2, 2) of (f, b), and weight (C,) of each exponent."""
    x = _x(t)
    everything = np.concatenate([finished, y])
    scale = _scale(y, finished)
    # Vague: ends as spread as all that was seen, curves that climb twice as much on their way.
    reach = 2 * scale / np.maximum(x[:, 0], 1e-9)
    vague = np.zeros((len(x), 2, 2))
    vague[:, 0, 0], vague[:, 1, 1] = scale**2, reach**2
    fits = fit(t, finished)
    learned = fits.points >= _PARAMETERS
    count = int(learned.sum())
    centre = float(np.mean(latest(everything)))
    default = np.stack([np.full(len(x), centre), 0.5 * reach], axis=1)
    if not count:
        return default, vague, np.full(len(x), 1 / len(x))
    pairs = np.stack([fits.end[learned], fits.height[learned]], axis=2)  # (M, C, 2)
    mean = (pairs.sum(axis=0) + _VAGUE / 2 * default) / (count + _VAGUE / 2)
    off = pairs - mean
    scatter = np.einsum("mci,mcj->cij", off, off)
    covariance = (scatter + _VAGUE * vague) / (count + _VAGUE)
    # Finished curves are those that were not stopped: where they ended says little of how low
    # others will.
    covariance[:, 0, 0] += scale**2
    # Each curve's own weights, averaged: one step of expectation maximisation.
    own = _posterior(t, finished[learned], mean, covariance, np.full(len(x), 1 / len(x)), noise)
    weight = (own.weight.sum(axis=0) + _VAGUE / len(x)) / (count + _VAGUE)
    return mean, covariance, weight


def _posterior(
    t: np.ndarray,
    y: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    weight: np.ndarray,
    noise: float,
) -> Ends:
    """Bayesian linear regression of each curve under each exponent (Bishop 2006, eq. 3.50-51)."""
    n, sx, sxx, sy, sxy, syy = _sums(t, y)
    variance = noise**2
    precision = np.linalg.inv(covariance)  # (C, 2, 2)
    # Design rows are (1, -x).
    gram = np.stack([np.stack([n + 0 * sx, -sx], axis=-1), np.stack([-sx, sxx], axis=-1)], axis=-2)
    moment = np.stack([sy + 0 * sx, -sxy], axis=-1)  # (N, C, 2)
    posterior = precision + gram / variance
    spread = np.linalg.inv(posterior)
    pull = np.einsum("cij,cj->ci", precision, mean) + moment / variance
    theta = np.einsum("ncij,ncj->nci", spread, pull)
    # log evidence, up to what all exponents share.
    _, log_determinant = np.linalg.slogdet(posterior)
    _, log_prior = np.linalg.slogdet(precision)
    fitted = np.einsum("nci,nci->nc", pull, theta)
    before = np.einsum("ci,cij,cj->c", mean, precision, mean)
    log_evidence = 0.5 * (log_prior - log_determinant - before + fitted - syy / variance)
    log_weight = np.log(weight) + log_evidence
    log_weight -= log_weight.max(axis=1, keepdims=True)
    w = np.exp(log_weight)
    sd = np.sqrt(np.maximum(spread[:, :, 0, 0], 0.0) + variance)
    return Ends(members=theta[:, :, 0], sd=sd, weight=w / w.sum(axis=1, keepdims=True))


def _x(t: np.ndarray) -> np.ndarray:
    return (t / t[-1])[None, :] ** -EXPONENTS[:, None] - 1


def _sums(t: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """n, sum x, sum x^2, sum y, sum xy, sum y^2 over each curve's reports, (N, 1) or (N, C)."""
    x = _x(t)
    there = np.isfinite(y)
    m, v = there.astype(float), np.where(there, y, 0.0)
    n, sy, syy = m.sum(axis=1), v.sum(axis=1), (v**2).sum(axis=1)
    return n[:, None], m @ x.T, m @ (x**2).T, sy[:, None], v @ x.T, syy[:, None]


def _scale(y: np.ndarray, finished: np.ndarray) -> float:
    """Spread of all reports; 1 where there is none to speak of."""
    seen = np.concatenate([y[np.isfinite(y)], finished[np.isfinite(finished)]])
    spread = float(np.std(seen)) if len(seen) else 0.0
    return spread if spread > 0 else 1.0
