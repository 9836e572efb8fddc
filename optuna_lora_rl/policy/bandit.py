"""Multi-armed bandits over discrete levels: the baseline that a learned policy has to beat.

Two models of what a configuration is worth, two ways to explore with each:

- *independent*: every level of every parameter is an arm of its own; a configuration is worth the
  sum of its arms. Thompson sampling from a Gaussian with unknown mean and variance (Russo et al.
  2018, "A Tutorial on Thompson Sampling", section 3; posterior from Murphy 2007, "Conjugate
  Bayesian analysis of the Gaussian distribution", eqs. 86-89), or UCB1-Tuned (Auer, Cesa-Bianchi
  and Fischer 2002, "Finite-time analysis of the multiarmed bandit problem", section 4).
- *linear-contextual*: a linear model of one-hot levels and of pairs of levels of the main
  parameters. Linear Thompson sampling (Agrawal and Goyal 2013, "Thompson sampling for contextual
  bandits with linear payoffs", algorithm 1) or LinUCB (Li et al. 2010, "A contextual-bandit
  approach to personalized news article recommendation", algorithm 1).

Notations
    n, d     number of observed configurations, number of parameters
    cells    array of shape (n, d): the level of each parameter, -1 where absent (see ``levels``)
    ranks    array of shape (n,): rewards in (0, 1), the place of each result among all
    z        array of shape (n,): rewards as normal scores, the normal quantiles of ``ranks``

Rewards are ranks, so a diverged run that is a million times worse than the rest counts as the
worst and no more, and scores need no scale.

>>> import numpy as np
>>> from optuna_lora_rl.policy.bandit import Bandit, rank_rewards
>>> from optuna_lora_rl.policy.dimensions import Dimension, make_space
>>> from optuna_lora_rl.policy.levels import make_grid
>>> grid = make_grid(make_space([Dimension("lora_rank", "int", 2, 64), Dimension("x", "float")]))
>>> rng, cells, scores = np.random.default_rng(0), np.empty((0, 2), dtype=int), []
>>> for _ in range(12):
...     bandit = Bandit(grid, cells, rank_rewards(np.array(scores)), algorithm="thompson")
...     cells = np.vstack([cells, bandit.propose(rng)])
...     scores.append(float(cells[-1].sum()))
>>> max(scores) > scores[0]
True
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING
from typing import Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna_lora_rl.policy.levels import Grid

Algorithm = Literal["thompson", "ucb"]

# Normal-inverse-gamma prior of an arm's normal scores: mean 0, worth one observation, and a
# variance of expectation beta / (alpha - 1) = 1, that of normal scores.
_KAPPA_0, _ALPHA_0, _BETA_0 = 1.0, 2.0, 1.0
# Noise of a normal score given its configuration, for the linear model; the weights' prior
# variance is 1 and features have length 1, so a configuration's value has prior variance 1.
_NOISE = 0.5
# Parameters that act together: their pairs of levels are features of the linear model.
_MAIN_ROLES = ("learning_rate", "rank", "alpha", "alpha_ratio", "batch_size")
_MAX_MAIN = 4
_MAX_FEATURES = 1500
_N_STARTS = 256


def rank_rewards(
    scores: np.ndarray, failed: np.ndarray | None = None, violation: np.ndarray | None = None
) -> np.ndarray:
    """The place of each result among all, in (0, 1), ties sharing the middle; shape (n,).

    Feasible results stand by their score, below them the infeasible ones by how much they violate
    the constraints, and lowest those that failed.

    Args:
        scores: larger is better, shape (n,); anything where ``failed``.
        failed: which results ended without a score, shape (n,).
        violation: sum of the violated constraints, shape (n,); 0 when feasible.
    """
    n = len(scores)
    failed = np.zeros(n, dtype=bool) if failed is None else failed
    violation = np.zeros(n) if violation is None else violation
    infeasible = (violation > 0) & ~failed
    kind = np.where(failed, 0.0, np.where(infeasible, 1.0, 2.0))
    value = np.where(failed, 0.0, np.where(infeasible, -violation, scores))
    keys = np.stack([kind, value], axis=1)
    if n and not (kind == 2.0).any():
        # Where nothing has worked yet, an untried configuration has to look better than these.
        keys = np.vstack([keys, [[2.0, 0.0]]])
    _, place, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - 0.5 * counts
    return (middle[place.reshape(-1)] / max(len(keys), 1))[:n]


def scalarise(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One score for several objectives, shape (n,): the augmented Chebyshev function on ranks.

    With random weights at every step the steps together cover the Pareto front (Knowles 2006,
    "ParEGO", eq. 2).

    Args:
        scores: larger is better, shape (n, m), no NaN.
        weights: shape (m,), not negative, of sum 1.
    """
    losses = np.stack([1.0 - rank_rewards(column) for column in scores.T], axis=1) * weights
    return -(losses.max(axis=1) + 0.05 * losses.sum(axis=1))


@dataclass(frozen=True)
class Bandit:
    """What the observed rewards say about the levels of a grid, and what to play next.

    Args:
        grid: the levels.
        cells: observed configurations, shape (n, d).
        ranks: their rewards in (0, 1), shape (n,).
        algorithm: ``"thompson"`` or ``"ucb"``.
        contextual: the linear-contextual model in place of independent arms.
        exploration: factor on the width of what is unknown; 0 is greedy, 1 the textbook.
        pending: configurations whose result is awaited, shape (k, d); UCB counts them as plays.
        tried: configurations not to propose again as long as there are others, shape (t, d).
    """

    grid: Grid
    cells: np.ndarray
    ranks: np.ndarray
    algorithm: Algorithm = "thompson"
    contextual: bool = False
    exploration: float = 1.0
    pending: np.ndarray | None = None
    tried: np.ndarray | None = None

    def propose(self, rng: np.random.Generator) -> np.ndarray:
        """The configuration to play next, shape (d,)."""
        value = self._linear_value(rng) if self.contextual else self._independent_value(rng)
        tried = {tuple(cell) for cell in ([] if self.tried is None else self.tried.tolist())}
        return _maximise(value, self.grid, tried, rng)

    def plays(self, cell: np.ndarray) -> list[tuple[int, float]]:
        """How often each level of ``cell`` was observed, and its mean reward (0.5 if never)."""
        found = []
        for j, level in enumerate(cell):
            rewards = self.ranks[self.cells[:, j] == level]
            found.append((len(rewards), float(rewards.mean()) if len(rewards) else 0.5))
        return found

    @cached_property
    def _z(self) -> np.ndarray:
        return np.array([NormalDist().inv_cdf(rank) for rank in self.ranks])

    def _independent_value(self, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        tables = [
            self._thompson_draws(j, int(size), rng)
            if self.algorithm == "thompson"
            else self._upper_bounds(j, int(size), rng)
            for j, size in enumerate(self.grid.sizes)
        ]

        def value(cells: np.ndarray) -> np.ndarray:
            return sum((t[cells[:, j]] for j, t in enumerate(tables)), np.zeros(len(cells)))

        return value

    def _thompson_draws(self, j: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """A mean from each arm's posterior, shape (size,)."""
        n, mean, scatter = _moments(self.cells[:, j], self._z, size)
        kappa_n = _KAPPA_0 + n  # (eq. 87)
        mu_n = n * mean / kappa_n  # (eq. 86) with mu_0 = 0
        alpha_n = _ALPHA_0 + 0.5 * n  # (eq. 88)
        beta_n = _BETA_0 + 0.5 * scatter + 0.5 * _KAPPA_0 * n * mean**2 / kappa_n  # (eq. 89)
        variance = beta_n / rng.gamma(alpha_n)
        return mu_n + self.exploration * np.sqrt(variance / kappa_n) * rng.normal(size=size)

    def _upper_bounds(self, j: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """UCB1-Tuned indices of the arms, shape (size,)."""
        n, mean, scatter = _moments(self.cells[:, j], self.ranks, size)
        awaited = np.zeros(size)
        if self.pending is not None:
            column = self.pending[:, j]
            awaited = np.bincount(column[column >= 0], minlength=size).astype(float)
        plays = n + awaited
        played = plays > 0
        seen = np.where(played, plays, 1.0)
        log_total = np.log(max(plays.sum(), 1.0))
        # V_j(s) <= 1/4, the largest variance of a reward in [0, 1].
        spread = scatter / np.maximum(n, 1.0) + np.sqrt(2.0 * log_total / seen)
        width = np.sqrt(log_total / seen * np.minimum(0.25, spread))
        bounds = np.where(n > 0, mean, 0.5) + self.exploration * width
        # "Play each machine once": an unplayed arm comes before all played ones, in any order.
        # The tiny draw breaks ties among played ones.
        draw = rng.random(size)
        return np.where(played, bounds + 1e-9 * draw, 10.0 + draw)

    def _linear_value(self, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        features = _Features.of(self.grid)
        design = features.dense(self.cells)
        precision = _NOISE**2 * np.eye(features.count) + design.T @ design  # A and B of the papers
        theta = np.linalg.solve(precision, design.T @ self._z)
        if self.algorithm == "thompson":
            # theta ~ N(theta_hat, v^2 B^-1): B = L L^T, so L^-T noise has covariance B^-1.
            factor = np.linalg.cholesky(precision)
            noise = np.linalg.solve(factor.T, rng.normal(size=features.count))
            drawn = theta + self.exploration * _NOISE * noise

            return lambda cells: features.dense(cells) @ drawn

        if self.pending is not None:
            waiting = features.dense(self.pending)
            precision = precision + waiting.T @ waiting
        covariance = np.linalg.inv(precision)
        jitter = 1e-9 * rng.normal(size=features.count)

        def upper_bound(cells: np.ndarray) -> np.ndarray:
            x = features.dense(cells)
            width = np.sqrt(np.maximum(np.einsum("ij,ij->i", x @ covariance, x), 0.0))
            return x @ (theta + jitter) + self.exploration * width

        return upper_bound


@dataclass(frozen=True)
class _Features:
    """One-hot levels and one-hot pairs of levels, scaled so that the vector has length 1."""

    sizes: np.ndarray
    offsets: np.ndarray
    pairs: tuple[tuple[int, int], ...]
    count: int

    @classmethod
    def of(cls, grid: Grid) -> _Features:
        roles = grid.space.role_columns
        main = [roles[role] for role in _MAIN_ROLES if role in roles][:_MAX_MAIN]
        if len(main) < 2:
            main = list(range(min(len(grid.sizes), _MAX_MAIN)))
        sizes = grid.sizes
        count = int(sizes.sum())
        pairs = []
        for a, b in combinations(main, 2):
            if count + sizes[a] * sizes[b] <= _MAX_FEATURES:
                pairs.append((a, b))
                count += int(sizes[a] * sizes[b])
        return cls(sizes, np.concatenate([[0], np.cumsum(sizes)]), tuple(pairs), count)

    def dense(self, cells: np.ndarray) -> np.ndarray:
        """Feature vectors, shape (n, count)."""
        rows = np.arange(len(cells))
        x = np.zeros((len(cells), self.count))
        for j, offset in enumerate(self.offsets[:-1]):
            there = cells[:, j] >= 0
            x[rows[there], offset + cells[there, j]] = 1.0
        offset = self.offsets[-1]
        for a, b in self.pairs:
            there = (cells[:, a] >= 0) & (cells[:, b] >= 0)
            x[rows[there], offset + cells[there, a] * self.sizes[b] + cells[there, b]] = 1.0
            offset += self.sizes[a] * self.sizes[b]
        return x / np.sqrt(max(len(self.sizes) + len(self.pairs), 1))


def _moments(
    levels: np.ndarray, rewards: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean (0 without plays) and sum of squared deviations by level, each (size,)."""
    there = levels >= 0
    levels, rewards = levels[there], rewards[there]
    n = np.bincount(levels, minlength=size).astype(float)
    mean = np.bincount(levels, weights=rewards, minlength=size) / np.maximum(n, 1.0)
    deviations = (rewards - mean[levels]) ** 2
    return n, mean, np.bincount(levels, weights=deviations, minlength=size)


def _maximise(
    value: Callable[[np.ndarray], np.ndarray],
    grid: Grid,
    tried: set[tuple[int, ...]],
    rng: np.random.Generator,
) -> np.ndarray:
    """The best cell that coordinate ascent from the best of many cells comes across.

    Exact for a sum over dimensions, and for a small grid, all of which is looked at. Cells in
    ``tried`` are passed over unless nothing else is found.
    """
    if np.prod(grid.sizes.astype(float)) <= _N_STARTS:
        seen = np.indices(tuple(grid.sizes)).reshape(len(grid.sizes), -1).T
    else:
        seen = grid.random(_N_STARTS, rng)
    values = value(seen)
    best, best_value = seen[values.argmax()], values.max()
    while True:
        around = grid.neighbours(best)
        if len(around) == 0:
            return best
        around_values = value(around)
        seen, values = np.vstack([seen, around]), np.concatenate([values, around_values])
        if around_values.max() <= best_value:
            break
        best, best_value = around[around_values.argmax()], around_values.max()
    for i in np.argsort(-values, kind="stable"):
        if tuple(seen[i].tolist()) not in tried:
            return seen[i]
    return best
