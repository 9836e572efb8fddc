"""Where proposals come from: a few hundred configurations a step, scored afterwards.

Notations
    n, m      finished and pending (running) trials, N candidates, D columns
    x         candidates, shape (N, D)
    source    index into ``SOURCES``, shape (N,)
    valid     shape (N,): not a repeat of a finished trial, nor close to a pending one

The source "transfer" is for configurations that earlier studies found good; a study without any
has none of it. Whatever can be sampled can be scored, so no space is too odd: discrete, mixed or
conditional. All random numbers come from the generator that is passed in, a torch one.

The best candidates climb to where the expected improvement is largest. Steps go by iRprop- (Igel &
Huesken 2003), which asks only for the gradient's signs: log expected improvement is steep and flat
by turns. Ordered columns with steps are taken as continuous on the way and rounded at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from functools import cache
from functools import cached_property

import numpy as np
import torch

from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Points
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.surrogate import Process

SOURCES = (
    "default",
    "sweep",
    "prior",
    "uniform",
    "axis",
    "mutation",
    "improvement",
    "transfer",
)
_LEARNING_RATE, _RANK, _ALPHA = (ROLES.index(r) for r in ("learning_rate", "rank", "alpha"))
_NODES = np.linspace(0.0, 1.0, NODES)
# What differs by less in a coordinate has not been moved.
_LIKE = 0.02
# Decades by which the incumbent's learning rate is moved, and the places of the ranks beside it.
_DECADES, _SIZES = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), np.array([0.0, 0.5, 1.0])
MOVES = len(_DECADES) * (len(_SIZES) + 1)

SAME = 1e-7
# What is no farther than this from a running trial, in every coordinate, would tell much the same;
# and what is so close to a failed one would fail as well, once failing is no accident.
NEAR = 0.03
NO_ACCIDENT = 2
# The first step uphill, as a share of the lengthscale, and the longest lengthscale that counts.
_FIRST_STEP, _LONGEST = 0.15, 0.7
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
        charged: what is known to be taken from each score, in its units, shape (n,): ``y`` is then
            the quality before it. ``None`` where nothing is known.
    """

    x: np.ndarray
    y: np.ndarray
    failed: np.ndarray
    infeasible: np.ndarray
    pending: np.ndarray
    horizon: int = 0
    charged: np.ndarray | None = None
    _points: tuple[Layout, Points] | None = field(default=None, init=False, repr=False)

    @classmethod
    def none(cls, dimensions: int) -> Trials:
        """Of a study that has not begun."""
        points, nothing = np.zeros((0, dimensions)), np.zeros(0, dtype=bool)
        return cls(points, np.zeros(0), nothing, nothing, points)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def begun(self) -> int:
        """How many trials there are, running ones included."""
        return len(self.x) + len(self.pending)

    @cached_property
    def good(self) -> np.ndarray:
        """Shape (n,): finished within the constraints, with a score of their own."""
        return ~(self.failed | self.infeasible)

    @cached_property
    def net(self) -> np.ndarray:
        """Scores less what is charged, shape (n,)."""
        return self.y if self.charged is None else self.y - self.charged

    def points(self, layout: Layout) -> Points:
        """The finished trials with what their space says of them."""
        if self._points is None or self._points[0] is not layout:
            self._points = (layout, layout.points(self.x))
        return self._points[1]

    def best(self, count: int, default: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best trials, shape (count, D), the default where there is none, and which are real.

        One row, the default, where nothing is finished.
        """
        if not len(self.x):
            return default[None], np.zeros(1, dtype=bool)
        order = np.argsort(np.where(self.good, -self.net, np.inf), kind="stable")[:count]
        real = self.good[order]
        return np.where(real[:, None], self.x[order], default), real

    @cached_property
    def best_at(self) -> int | None:
        """The best trial's place; ``None`` without a good one."""
        if not self.good.any():
            return None
        return int(np.argmax(np.where(self.good, self.net, -np.inf)))

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


def rand(*shape: int, generator: torch.Generator) -> np.ndarray:
    """Uniform random numbers."""
    drawn: np.ndarray = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
    return drawn


def randn(*shape: int, generator: torch.Generator) -> np.ndarray:
    """Normal random numbers."""
    drawn: np.ndarray = torch.randn(shape, generator=generator, dtype=torch.float64).numpy()
    return drawn


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
def _sobol(count: int, dimensions: int) -> np.ndarray:
    engine = torch.quasirandom.SobolEngine(dimensions)
    net: np.ndarray = engine.draw(count + 1, dtype=torch.float64)[1:].numpy()
    return net


def uniform_points(count: int, dimensions: int, generator: torch.Generator) -> np.ndarray:
    """A randomly shifted Sobol net, shape (count, dimensions) (Cranley & Patterson 1976)."""
    return (_sobol(count, dimensions) + rand(1, dimensions, generator=generator)) % 1.0


@cache
def _single(*values: float) -> np.ndarray:
    """Constants rounded to single precision, as they were when the shipped policy was trained."""
    return np.array(values, dtype=np.float32).astype(float)


@cache
def _scales(count: int, *values: float) -> np.ndarray:
    """The values again and again, shape (count, 1)."""
    return np.resize(_single(*values), count)[:, None]


def prior_points(layout: Layout, count: int, generator: torch.Generator) -> np.ndarray:
    cumulative, D = layout.prior_cells, len(layout)
    cells = cumulative.shape[-1]
    draw = torch.rand(D, count, generator=generator, dtype=torch.float64)
    cell = torch.searchsorted(cumulative, draw).clamp_max(cells - 1).numpy()
    x = np.ascontiguousarray(((cell + rand(D, count, generator=generator)) / cells).T)
    draw_ratio = randn(count, generator=generator)
    if layout.turns and layout.is_lora:
        wished = layout.ranks(x) + GUIDE_RATIO + GUIDE_RATIO_SPREAD * draw_ratio
        x[:, layout.alpha] = layout.nearest_alpha(wished)
    return x


def perturb(
    x: np.ndarray,
    unordered: np.ndarray,
    scale: np.ndarray,
    probability: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Points moved in a random subset of columns, always at least one.

    Args:
        x: shape (N, D).
        unordered: columns that jump to any of their values, shape (D,).
        scale: deviation of a move, broadcastable to x.
        probability: chance that a column moves.
        generator: of the random numbers.
    """
    chance = rand(*x.shape, generator=generator)
    moves = (chance < probability) | (chance == chance.min(1, keepdims=True))
    step = randn(*x.shape, generator=generator) * scale
    jump = rand(*x.shape, generator=generator)
    # Reflected at the faces, so that the borders are met as often as the inside.
    moved = np.abs(np.where(unordered, jump, x + step))
    moved = 1.0 - np.abs(1.0 - moved)
    return np.minimum(np.maximum(np.where(moves, moved, x), 0.0), 1.0)


def _axis_points(
    anchors: np.ndarray, layout: Layout, count: int, generator: torch.Generator
) -> np.ndarray:
    """The anchors moved along one axis each, every other one along the learning rate.

    The learning rate goes up and down in growing steps from a third of a decade to two, since
    its scale is what a guide gets wrong.
    """
    rows = np.arange(count)
    x = anchors[rows % len(anchors)]
    moved = perturb(x, layout.unordered, _single(0.3), 0.0, generator)
    size, up = rand(2, count, generator=generator)
    size = 0.33 * 1.6 ** (4.0 * size)
    column = layout.column[_LEARNING_RATE]
    if column >= 0:
        table = layout.natural[_LEARNING_RATE]
        step = np.where(up < 0.5, size, -size) / max(float(table[-1] - table[0]), 0.3)
        use = rows // len(anchors) % 2 == 0
        along = x[use]
        along[:, column] = np.minimum(np.maximum(along[:, column] + step[use], 0.0), 1.0)
        moved[use] = along
    return moved


def moves(layout: Layout, trials: Trials) -> np.ndarray:
    """The incumbent at other learning rates and sizes, shape (MOVES, D).

    A tenth, a third, three times and ten times its learning rate, each with its own size and at
    three ranks from the smallest to the largest; alpha goes with the rank. Where a space lacks
    them there are repeats, so that steps of different spaces are alike.
    """
    top, _ = trials.best(1, layout.default)
    rate, rank = layout.column[_LEARNING_RATE], layout.column[_RANK]
    x = np.tile(top[0], (MOVES, 1))
    steps, sizes = len(_DECADES), len(_SIZES) + 1
    if rate >= 0:
        table = layout.natural[_LEARNING_RATE]
        step = np.tile(_DECADES, sizes) / max(float(table[-1] - table[0]), 0.3)
        x[:, rate] = np.minimum(np.maximum(x[:, rate] + step, 0.0), 1.0)
    if rank < 0:
        return x
    x[steps:, rank] = np.repeat(_SIZES, steps)
    if layout.turns:  # at the same ratio
        alpha = np.interp(top[0, layout.alpha], _NODES, layout.natural[_ALPHA])
        grown = layout.ranks(x) - layout.ranks(top[:1])
        x[steps:, layout.alpha] = layout.nearest_alpha(alpha + grown)[steps:]
    return x


def strays(layout: Layout, trials: Trials, x: np.ndarray) -> np.ndarray:
    """Which of x (N, D) differ from every trial in more than learning rate and size, (N,)."""
    others = np.array([c not in _sized(layout) for c in range(len(layout))], dtype=bool)
    begun = np.concatenate([trials.x, trials.pending])
    if not others.any() or not len(begun):
        return np.zeros(len(x), dtype=bool)
    return ~within(x[:, others], begun[:, others], _LIKE)


def _sized(layout: Layout) -> set[int]:
    """Columns of the learning rate and of what makes an adapter larger or stronger."""
    roles = ("learning_rate", "rank", "alpha", "alpha_ratio")
    return {layout.column[ROLES.index(role)] for role in roles}


def proposals(
    layout: Layout,
    trials: Trials,
    snap: Snap,
    generator: torch.Generator,
    count: int,
    grid: np.ndarray | None,
    earlier: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of every source but the local search: points (N, D) and their sources (N,)."""
    share = max(count // 16, 2)
    anchors, _ = trials.best(5, layout.default)
    D = len(layout)
    sets = [
        ("default", layout.default[None]),
        ("sweep", layout.sweep),
        ("prior", prior_points(layout, 3 * share, generator)),
        ("uniform", uniform_points(4 * share, D, generator)),
        ("axis", _axis_points(anchors, layout, 3 * share, generator)),
    ]
    parents = anchors[np.arange(3 * share) % len(anchors)]
    scale = _scales(3 * share, 0.03, 0.1, 0.3)
    chance = float(_single(max(0.25, 1.5 / D))[0])
    sets.append(("mutation", perturb(parents, layout.unordered, scale, chance, generator)))
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
    layout: Layout,
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
    moved = perturb(parents, layout.unordered, widths, chance, generator)
    return np.concatenate([climbers, snap(moved)])


@cache
def _dense(n: int, count: int) -> np.ndarray:
    """``count`` places among n, dense at the beginning."""
    share = torch.linspace(0.0, 1.0, min(count, n)) ** 1.7
    places: np.ndarray = (share * (n - 1)).long().numpy()
    return np.maximum(places, np.arange(len(places)))


def climb(
    x: np.ndarray, layout: Layout, process: Process, best: float | np.ndarray, steps: int
) -> np.ndarray:
    """Where steps uphill from x (K, D) lead, not yet snapped; ``best`` may be of each (K,)."""
    step = _FIRST_STEP * np.minimum(np.exp(process.theta[:-2]), _LONGEST)
    previous, apart = np.zeros(x.shape), process.apart(x)
    for _ in range(steps):
        coordinates, slopes = layout.model_coordinates(x)
        gradient = process.slope(coordinates, best, apart)
        sign = np.sign(layout.pull_back(gradient, slopes))
        agreement = (sign * previous).astype(np.int8)
        step = step * _GROWTH[agreement]
        previous = sign * (agreement >= 0)
        x = np.minimum(np.maximum(x + previous * step, 0.0), 1.0)
    return x


def allowed(x: np.ndarray, close: Closeness, trials: Trials) -> np.ndarray:
    """What may be proposed, shape (N,).

    No repeats and nothing close to a running trial or to failed ones; where nothing else is left,
    what is close; then repeats of what did not fail; else anything.
    """
    valid = ~close.blocked
    if not valid.any():
        valid = ~(close.repeat | within(x, trials.pending, SAME))
    if not valid.any():
        valid = ~within(x, trials.x[trials.failed], SAME)
    return valid if valid.any() else np.ones(len(x), dtype=bool)
