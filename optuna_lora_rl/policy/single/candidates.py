"""Where proposals come from; the twin of :mod:`~optuna_lora_rl.policy.candidates`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from functools import cache
from functools import cached_property

import numpy as np
import torch

from optuna_lora_rl.policy.ascent import FIRST_STEP
from optuna_lora_rl.policy.ascent import LONGEST
from optuna_lora_rl.policy.candidates import NEAR
from optuna_lora_rl.policy.candidates import NO_ACCIDENT
from optuna_lora_rl.policy.candidates import SAME
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import sobol
from optuna_lora_rl.policy.candidates import spread_places
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.single.process import Process
from optuna_lora_rl.policy.single.tables import Points
from optuna_lora_rl.policy.single.tables import Tables
from optuna_lora_rl.policy.single.tables import rand
from optuna_lora_rl.policy.single.tables import randn

_LEARNING_RATE = ROLES.index("learning_rate")

# How a step grows where the sign is new (0), stayed (1) or turned (-1, the last).
_GROWTH = np.array([1.0, 1.3, 0.5])

# Moves points (N, D) onto configurations that exist.
Snap = Callable[[np.ndarray], np.ndarray]


@dataclass
class Trials:
    """The trials of a study.

    Args:
        x: finished trials, shape (n, D); no NaN.
        y: standardised scores, larger is better, shape (n,); failed trials carry a bad one.
        failed: which of them failed, shape (n,).
        infeasible: which of them broke a constraint, shape (n,).
        pending: running trials, shape (m, D).
        horizon: number of trials that the study will have; 0 where unknown.
    """

    x: np.ndarray
    y: np.ndarray
    failed: np.ndarray
    infeasible: np.ndarray
    pending: np.ndarray
    horizon: int = 0
    _points: tuple[Tables, Points] | None = field(default=None, init=False, repr=False)

    @classmethod
    def none(cls, dimensions: int) -> Trials:
        """Of a study that has not begun."""
        points, nothing = np.zeros((0, dimensions)), np.zeros(0, dtype=bool)
        return cls(points, np.zeros(0), nothing, nothing, points)

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def good(self) -> np.ndarray:
        """Shape (n,): finished within the constraints, with a score of their own."""
        return ~(self.failed | self.infeasible)

    def points(self, tables: Tables) -> Points:
        """The finished trials with what their space says of them."""
        if self._points is None or self._points[0] is not tables:
            self._points = (tables, tables.points(self.x))
        return self._points[1]

    def best(self, count: int, default: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best trials, shape (count, D), the default where there is none, and which are real.

        One row, the default, where nothing is finished.
        """
        if not len(self.x):
            return default[None], np.zeros(1, dtype=bool)
        order = np.argsort(np.where(self.good, -self.y, np.inf), kind="stable")[:count]
        real = self.good[order]
        return np.where(real[:, None], self.x[order], default), real

    @cached_property
    def best_at(self) -> int | None:
        """The best trial's place; ``None`` without a good one."""
        if not self.good.any():
            return None
        return int(np.argmax(np.where(self.good, self.y, -np.inf)))

    @cached_property
    def doomed(self) -> np.ndarray:
        """Failed trials that nothing should come near: all, where failing is no accident."""
        return self.x[self.failed] if self.failed.sum() >= NO_ACCIDENT else self.x[:0]


@dataclass(frozen=True)
class Closeness:
    """How points (N, D) stand to the trials, each of shape (N,).

    Args:
        repeat: the same as a finished trial.
        near: too close to a running trial, or to the failed ones.
    """

    repeat: np.ndarray
    near: np.ndarray

    @property
    def blocked(self) -> np.ndarray:
        """Points that are not worth proposing."""
        return self.repeat | self.near

    def with_(self, other: Closeness) -> Closeness:
        return Closeness(
            np.concatenate([self.repeat, other.repeat]), np.concatenate([self.near, other.near])
        )

    def __getitem__(self, rows: np.ndarray) -> Closeness:
        return Closeness(self.repeat[rows], self.near[rows])


def closeness(x: np.ndarray, trials: Trials) -> Closeness:
    """How points x stand to the trials."""
    near = within(x, trials.pending, NEAR) | within(x, trials.doomed, NEAR)
    return Closeness(same(x, trials.x), near)


def within(x: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """Which of x (N, D) lie so close to one of the others (k, D) in every column, shape (N,)."""
    if not len(others):
        return np.zeros(len(x), dtype=bool)
    gap = torch.cdist(torch.from_numpy(x), torch.from_numpy(others), p=torch.inf).numpy()
    return np.asarray(gap.min(1) < distance)


def same(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``within`` a distance of ``SAME``, for many others: by their places along one direction."""
    found = np.zeros(len(x), dtype=bool)
    if not len(others):
        return found
    direction = _direction(x.shape[1])
    line = others @ direction
    order = np.argsort(line)
    line, at = line[order], x @ direction
    # Whatever is the same in every column lies no farther apart along the direction.
    reach = SAME * direction.sum() + 1e-12
    first, last = np.searchsorted(line, at - reach), np.searchsorted(line, at + reach, "right")
    left = np.flatnonzero(last > first)
    while len(left):
        there = others.take(order[first[left]], 0)
        found[left] |= np.abs(there - x.take(left, 0)).max(1) < SAME
        first[left] += 1
        left = left[first[left] < last[left]]
    return found


@cache
def _direction(dimensions: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, dimensions)


@cache
def _net(count: int, dimensions: int) -> np.ndarray:
    net: np.ndarray = sobol(count, dimensions).numpy()
    return net


@cache
def _single(*values: float) -> np.ndarray:
    """Values in torch's default precision, in which the batched form keeps its constants."""
    return np.array(values, dtype=np.float32).astype(float)


@cache
def _scales(count: int, *values: float) -> np.ndarray:
    """The values again and again, shape (count, 1)."""
    return np.resize(_single(*values), count)[:, None]


def _prior_points(tables: Tables, count: int, generator: torch.Generator) -> np.ndarray:
    cumulative, D = tables.prior_cells, len(tables)
    cells = cumulative.shape[-1]
    draw = torch.rand(D, count, generator=generator, dtype=torch.float64)
    cell = torch.searchsorted(cumulative, draw).clamp_max(cells - 1).numpy()
    x = np.ascontiguousarray(((cell + rand(D, count, generator=generator)) / cells).T)
    draw_ratio = randn(count, generator=generator)
    if tables.turns and tables.is_lora:
        wished = tables.ranks(x) + GUIDE_RATIO + GUIDE_RATIO_SPREAD * draw_ratio
        x[:, tables.alpha] = tables.nearest_alpha(wished)
    return x


def perturb(
    x: np.ndarray,
    unordered: np.ndarray,
    scale: np.ndarray,
    probability: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Points moved in a random subset of columns; ``scale`` is broadcastable to x (N, D)."""
    chance = rand(*x.shape, generator=generator)
    moves = (chance < probability) | (chance == chance.min(1, keepdims=True))
    step = randn(*x.shape, generator=generator) * scale
    jump = rand(*x.shape, generator=generator)
    moved = np.abs(np.where(unordered, jump, x + step))
    moved = 1.0 - np.abs(1.0 - moved)
    return np.minimum(np.maximum(np.where(moves, moved, x), 0.0), 1.0)


def _axis_points(
    anchors: np.ndarray, tables: Tables, count: int, generator: torch.Generator
) -> np.ndarray:
    rows = np.arange(count)
    x = anchors[rows % len(anchors)]
    moved = perturb(x, tables.unordered, _single(0.3), 0.0, generator)
    size, up = rand(2, count, generator=generator)
    size = 0.33 * 1.6 ** (4.0 * size)
    column = tables.column[_LEARNING_RATE]
    if column >= 0:
        table = tables.natural[_LEARNING_RATE]
        step = np.where(up < 0.5, size, -size) / max(float(table[-1] - table[0]), 0.3)
        use = rows // len(anchors) % 2 == 0
        along = x[use]
        along[:, column] = np.minimum(np.maximum(along[:, column] + step[use], 0.0), 1.0)
        moved[use] = along
    return moved


def proposals(
    tables: Tables,
    trials: Trials,
    snap: Snap,
    generator: torch.Generator,
    count: int,
    grid: np.ndarray | None,
    earlier: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of every source but the local search: points (N, D) and their sources (N,)."""
    share = max(count // 16, 2)
    anchors, _ = trials.best(5, tables.default)
    D = len(tables)
    sets = [
        ("default", tables.default[None]),
        ("sweep", tables.sweep),
        ("prior", _prior_points(tables, 3 * share, generator)),
        ("uniform", (_net(4 * share, D) + rand(1, D, generator=generator)) % 1.0),
        ("axis", _axis_points(anchors, tables, 3 * share, generator)),
    ]
    parents = anchors[np.arange(3 * share) % len(anchors)]
    scale = _scales(3 * share, 0.03, 0.1, 0.3)
    chance = float(_single(max(0.25, 1.5 / D))[0])
    sets.append(("mutation", perturb(parents, tables.unordered, scale, chance, generator)))
    if grid is not None:
        sets.append(("uniform", grid))
    if earlier is not None:
        sets.append(("transfer", earlier))
    source = _sources(tuple((name, len(points)) for name, points in sets))
    return snap(np.concatenate([points for _, points in sets])), source


@cache
def _sources(counts: tuple[tuple[str, int], ...]) -> np.ndarray:
    return np.repeat([SOURCES.index(name) for name, _ in counts], [count for _, count in counts])


def children(
    x: np.ndarray,
    climb: Callable[[np.ndarray], np.ndarray],
    tables: Tables,
    snap: Snap,
    generator: torch.Generator,
    turn: int,
) -> np.ndarray:
    """A round of the local search: what climbs from the best points x, and changes of both."""
    climbers = snap(climb(x[_dense(len(x), max(len(x) // 4, 2))]))
    parents = np.concatenate([climbers, x])
    scale = 0.15 * 0.3**turn
    widths = _scales(len(parents), scale, 0.3 * scale)
    chance = float(_single(max(0.34, 2.0 / x.shape[1]))[0])
    moved = perturb(parents, tables.unordered, widths, chance, generator)
    return np.concatenate([climbers, snap(moved)])


@cache
def _dense(n: int, count: int) -> np.ndarray:
    places: np.ndarray = spread_places(n, count).numpy()
    return places


def climb(x: np.ndarray, tables: Tables, process: Process, best: float, steps: int) -> np.ndarray:
    """Where steps uphill from x (K, D) lead; the twin of ``ascent.climb``."""
    step = FIRST_STEP * np.minimum(np.exp(process.theta[:-2]), LONGEST)
    previous, apart = np.zeros(x.shape), process.apart(x)
    for _ in range(steps):
        coordinates, slopes = tables.model_coordinates(x)
        gradient = process.slope(coordinates, best, apart)
        sign = np.sign(tables.pull_back(gradient, slopes))
        agreement = (sign * previous).astype(np.int8)
        step = step * _GROWTH[agreement]
        previous = sign * (agreement >= 0)
        x = np.minimum(np.maximum(x + previous * step, 0.0), 1.0)
    return x


def allowed(x: np.ndarray, close: Closeness, trials: Trials) -> np.ndarray:
    """What may be proposed, shape (N,); the twin of ``candidates._allowed``."""
    valid = ~close.blocked
    if not valid.any():
        valid = ~(close.repeat | within(x, trials.pending, SAME))
    if not valid.any():
        valid = ~within(x, trials.x[trials.failed], SAME)
    return valid if valid.any() else np.ones(len(x), dtype=bool)
