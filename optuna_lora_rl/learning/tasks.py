"""Tasks: a search space, a surface over it, its noise, and what is best there.

A task's space and truth are drawn together, since in life they hang together: whoever expects a
learning rate writes a range round it, and is sometimes wrong. In two LoRA tasks of five the best
learning rate is far from the guides' (up to two decades), in a tenth of the LoRA spaces the
surface knows nothing of LoRA, and a quarter of all spaces are not LoRA ones. Where measured
response surfaces are given, part of the LoRA tasks are cut out of them. Some tasks carry a
constraint, such as a largest adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from optuna_lora_rl.learning.contexts import draw_context
from optuna_lora_rl.learning.measured import ResponseSurface
from optuna_lora_rl.learning.measured import Slice
from optuna_lora_rl.learning.measured import draw_slice
from optuna_lora_rl.learning.surfaces import Surface
from optuna_lora_rl.learning.surfaces import draw_surface
from optuna_lora_rl.policy.candidates import rand
from optuna_lora_rl.policy.candidates import randn
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.lora_surfaces import natural_values
from optuna_lora_rl.policy.lora_surfaces import tables_lift
from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES

_MAX_DIMENSIONS = 10
_TARGETS = ("qv", "attention", "mlp", "all-linear")
_LAYERS = ("all", "first-half", "last-half", "middle")
GROUPS = ("usual_scale", "other_scale", "measured", "not_lora")
# Decades from the guides' learning rate beyond which a task's scale is another one.
_OTHER_SCALE = 0.7
_CONSTRAINED = 0.08
_MOST_LEVELS = 64
# Response surfaces that a task's bank draws: fewer than at work, where a space has one bank.
_SURFACES = 600
_LEARNING_RATE = ROLES.index("learning_rate")
# Maps points (N, D) to values and failures, each (N,).
_Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(eq=False)
class Task:
    """A problem to tune.

    Args:
        space: what is tuned.
        surface: what configurations score, unless the task was cut out of measurements.
        cut: of measurements; then it overrules ``surface``.
        noise: deviation of a run, in units of ``best - median``.
        limit: largest value of the constrained quantity, infinite without constraint.
        best: the largest value found by a long search.
        median: over uniform configurations that do not fail.
        truth: what the critic may know while training, shape (P,).
        context: what the policy is told of model, data and run, rightly or not.
        charges: whether it is told what a configuration costs.
        peak: log10 of the best learning rate, as far as one can say; NaN where there is none.
    """

    space: Space
    surface: Surface
    cut: Slice | None
    noise: float
    limit: float = math.inf
    best: float = 1.0
    median: float = 0.0
    truth: np.ndarray = field(default_factory=lambda: np.zeros(4, dtype=np.float32))
    context: TuningContext | None = None
    charges: bool = False
    peak: float = math.nan

    @cached_property
    def layout(self) -> Layout:
        """Of the space."""
        return Layout(self.space, self.context, charged=self.charges, surfaces=_SURFACES)

    def cost(self, x: np.ndarray) -> np.ndarray:
        """What configurations x (N, D) are charged, in units of the score, shape (N,)."""
        cost = self.surface.price(x, self.layout) if self.cut is None else self.cut.charge(x)
        return cost / (self.best - self.median)

    @property
    def floor(self) -> float:
        """Regret that is as good as none: half the noise, at least 0.02."""
        return max(0.5 * self.noise, 0.02)

    @property
    def constrained(self) -> bool:
        """Whether there is a constraint."""
        return self.limit < math.inf

    @property
    def group(self) -> str:
        """One of ``GROUPS``.

        A LoRA space over a surface that knows nothing of LoRA counts as another scale: the
        guides are wrong there, too.
        """
        if self.cut is not None:
            return "measured"
        is_lora, shift, _, lora_space = self.truth.tolist()
        if lora_space < 0.5:
            return "not_lora"
        return "other_scale" if abs(shift) > _OTHER_SCALE or is_lora < 0.5 else "usual_scale"

    def value(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw values and failures at x (N, D), each (N,)."""
        return self.surface(x, self.layout) if self.cut is None else self.cut(x)

    def score(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Noise-free scores (1 the best known, 0 the median) and failures, each (N,)."""
        value, failed = self.value(x)
        return (value - self.median) / (self.best - self.median), failed

    def excess(self, x: np.ndarray) -> np.ndarray:
        """The constrained quantity less its limit, kept when <= 0, shape (N,); NaN without."""
        if not self.constrained:
            return np.full(len(x), math.nan)
        return self.surface.demand(x, self.layout) - self.limit


def draw_tasks(
    count: int,
    seed: int,
    surfaces: Sequence[ResponseSurface] = (),
    measured: float = 0.65,
    *,
    constrained: bool = True,
    contexts: bool = False,
    lora: float = 0.75,
) -> list[Task]:
    """Random tasks; the same seed and surfaces give the same tasks.

    Args:
        count: how many.
        seed: of everything drawn.
        surfaces: measured ones to cut tasks out of; none for synthetic tasks only.
        measured: share of the LoRA tasks that are measured ones, where there are surfaces.
        constrained: whether some have a constraint; without, the same tasks lose it.
        contexts: whether most know something of model, data and run, some of them wrongly, and
            half of those that charge for cost know what.
        lora: share of the LoRA spaces.
    """
    rng = np.random.default_rng(seed)
    drawn: list[Task] = []
    while len(drawn) < count:
        task = _draw_task(rng, surfaces, measured if surfaces else 0.0, constrained, lora)
        if task.best - task.median > 1e-3:
            if contexts and task.truth[3] > 0:
                task = told(task, np.random.default_rng([seed, len(drawn)]))
            drawn.append(task)
    return drawn


def _draw_task(
    rng: np.random.Generator,
    surfaces: Sequence[ResponseSurface],
    measured: float,
    constrained: bool,
    lora: float,
) -> Task:
    lora_space = rng.random() < lora
    peak = _draw_peak(rng)
    cut = draw_slice(rng, surfaces) if lora_space and rng.random() < measured else None
    if cut is not None:
        space = cut.space
    else:
        space = make_space(_lora_dimensions(rng, peak) if lora_space else _other_dimensions(rng))
    layout = Layout(space)
    is_lora = lora_space and (cut is not None or bool(rng.random() < 0.9))
    surface = draw_surface(rng, layout, is_lora=is_lora, peak=peak)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = float(np.exp(rng.uniform(np.log(0.003), np.log(0.08))))
    task = Task(space, surface, cut, noise)
    if rng.random() < _CONSTRAINED:
        sample = _snap(space, uniform_points(256, len(space), generator))
        quantile = rng.uniform(0.3, 0.7)
        if constrained:
            task.limit = float(np.quantile(surface.demand(sample, layout), quantile))
    task.best, task.median, place = _search(_allowed(task), task, generator)
    if cut is not None:  # the seeds' noise, or more: fewer evaluation examples are noisier
        span = task.best - task.median
        task.noise = min(max(task.noise, cut.surface.noise / max(span, 1e-9)), 0.3)
    lr = float(layout.points(place[None]).roles[0, _LEARNING_RATE])
    known = is_lora and layout.column[_LEARNING_RATE] >= 0
    if known:
        task.peak = peak if cut is None else lr + _lift(layout, place)
    truth = [float(is_lora), (lr - GUIDE_LR) * known, math.log(task.noise), float(lora_space)]
    task.truth = np.array(truth, dtype=np.float32)
    return task


def _lift(layout: Layout, place: np.ndarray) -> float:
    """Decades from a point's learning rate to the equally good one at the guides' values."""
    points = layout.points(np.stack([place, layout.default]))
    own, usual = tables_lift(natural_values(points, layout)).tolist()
    return float(own - usual)


def told(task: Task, rng: np.random.Generator) -> Task:
    """The task with something known of it before the first trial, or nothing, or what is wrong."""
    small = task.cut is None and bool(task.surface.overfit[0] > 0)
    measured = {} if task.cut is None else task.cut.known()
    context = draw_context(rng, task.space, task.peak, small=small, measured=measured)
    if task.cut is not None:
        costly = task.cut.price > 0
    else:
        costly = task.surface.is_lora and bool(task.surface.cost.any())
    return replace(task, context=context, charges=costly and bool(rng.random() < 0.5))


def _allowed(task: Task) -> _Evaluate:
    """The task's value where the constraint is kept."""

    def evaluate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, failed = task.value(x)
        return value, failed | (task.excess(x) > 0)

    return evaluate


def _draw_peak(rng: np.random.Generator) -> float:
    """log10 of the best learning rate: near the guides' for most, decades off for some."""
    kind = rng.random()
    if kind < 0.6:
        return GUIDE_LR + rng.normal(0.05, 0.35)
    if kind < 0.86:
        return GUIDE_LR + rng.uniform(0.8, 2.2)
    return GUIDE_LR - rng.uniform(0.6, 1.8)


def _lora_dimensions(rng: np.random.Generator, peak: float) -> list[Dimension]:
    dimensions = []
    if rng.random() < 0.96:
        dimensions.append(_learning_rate(rng, peak))
    if rng.random() < 0.95 or not dimensions:
        dimensions.append(_octaves(rng, "lora_rank", (1.0, 3.5), (4.5, 8.0)))
    which = rng.random()
    if which < 0.45:
        dimensions.append(_octaves(rng, "lora_alpha", (1.0, 4.0), (5.0, 9.0)))
    elif which < 0.65:
        dimensions.append(
            Dimension("lora_alpha_ratio", "float", 0.25, 2.0 ** rng.integers(2, 5), log=True)
        )
    if rng.random() < 0.5:
        dimensions.append(
            Dimension("lora_dropout", "float", 0.0, float(rng.choice([0.1, 0.2, 0.3])))
        )
    if rng.random() < 0.5:
        chosen = _TARGETS if rng.random() < 0.6 else ("qv", "all-linear")
        dimensions.append(Dimension("target_modules", "categorical", choices=chosen))
    if rng.random() < 0.15:
        dimensions.append(Dimension("layers", "categorical", choices=_LAYERS))
    if rng.random() < 0.4:
        dimensions.append(_octaves(rng, "batch_size", (0.0, 3.0), (4.0, 7.0)))
    if rng.random() < 0.3:
        dimensions.append(Dimension("weight_decay", "float", 0.0, float(rng.choice([0.1, 0.3]))))
    if rng.random() < 0.2:
        dimensions.append(Dimension("warmup_ratio", "float", 0.0, 0.2))
    if rng.random() < 0.2:
        dimensions.append(_octaves(rng, "max_steps", (3.0, 5.0), (6.0, 9.0)))
    for k in range(int(rng.integers(0, 3))):
        dimensions.append(_plain(rng, f"other_{k}"))
    return dimensions[:_MAX_DIMENSIONS]


def _learning_rate(rng: np.random.Generator, peak: float) -> Dimension:
    """A range round what its author believed: two times in three the truth, else the guide."""
    believed = peak if rng.random() < 0.65 else GUIDE_LR
    low = believed + rng.normal(0.0, 0.4) - rng.uniform(0.5, 2.5)
    high = max(low + 1.0, believed + rng.normal(0.0, 0.4) + rng.uniform(0.5, 2.5))
    # The best value seldom lies outside the range.
    low, high = min(low, peak + 0.3), max(high, peak - 0.3)
    if rng.random() < 0.6:
        low, high = np.floor(low), np.ceil(high)
    return Dimension("learning_rate", "float", 10.0**low, 10.0**high, log=True)


def _octaves(
    rng: np.random.Generator, name: str, low: tuple[float, float], high: tuple[float, float]
) -> Dimension:
    smallest, largest = round(rng.uniform(*low)), round(rng.uniform(*high))
    if rng.random() < 0.4:
        powers = tuple(int(2**k) for k in range(smallest, largest + 1))
        return Dimension(name, "categorical", choices=powers)
    return Dimension(name, "int", float(2**smallest), float(2**largest), log=True)


def _plain(rng: np.random.Generator, name: str) -> Dimension:
    kind = rng.random()
    if kind < 0.6:
        return Dimension(name, "float", 0.0, 1.0)
    if kind < 0.8:
        return Dimension(name, "int", 1.0, float(rng.integers(2, 20)))
    choices = tuple("abcdef"[: int(rng.integers(2, 7))])
    return Dimension(name, "categorical", choices=choices)


def _other_dimensions(rng: np.random.Generator) -> list[Dimension]:
    """A space of some other trade; some of its names are those of network training."""
    dimensions = [_plain(rng, f"x{k}") for k in range(int(rng.integers(1, _MAX_DIMENSIONS - 2)))]
    if rng.random() < 0.5:
        low = rng.uniform(-6.0, -3.0)
        high = low + rng.uniform(1.5, 5.0)
        dimensions.append(Dimension("learning_rate", "float", 10.0**low, 10.0**high, log=True))
        if rng.random() < 0.5:
            dimensions.append(_octaves(rng, "batch_size", (2.0, 5.0), (6.0, 9.0)))
        if rng.random() < 0.5:
            dimensions.append(Dimension("dropout", "float", 0.0, 0.5))
    return dimensions[:_MAX_DIMENSIONS]


def _snap(space: Space, x: np.ndarray) -> np.ndarray:
    """Points moved to the nearest level along each axis that has at most so many.

    Nearest in the unit cube, where ``Space.snap`` takes the nearest value; kept, so that a seed
    gives the tasks that it has always given.
    """
    x = np.minimum(np.maximum(x, 0.0), 1.0)
    for column, dimension in enumerate(space.dimensions):
        if dimension.n_levels is not None and dimension.n_levels <= _MOST_LEVELS:
            levels = dimension.grid(_MOST_LEVELS)
            x[:, column] = levels[np.abs(x[:, column, None] - levels).argmin(1)]
    return x


def _search(
    evaluate: _Evaluate, task: Task, generator: torch.Generator
) -> tuple[float, float, np.ndarray]:
    """Best value and median of a surface, and the best point, (D,)."""
    space, unordered = task.space, task.layout.unordered
    x = _snap(space, uniform_points(1024, len(space), generator))
    value, failed = evaluate(x)
    alive = np.sort(value if failed.all() else value[~failed])
    median = float(alive[(len(alive) - 1) // 2])
    value = np.where(failed, -np.inf, value)
    for turn in range(6):
        top = np.argsort(-value, kind="stable")[:16]
        parents = np.tile(x[top], (8, 1))
        step = randn(*parents.shape, generator=generator) * (0.25 * 0.5**turn)
        chosen = rand(*parents.shape, generator=generator) < 0.4
        jump = rand(*parents.shape, generator=generator)
        moved = np.where(unordered, jump, parents + step)
        born = _snap(space, np.where(chosen, moved, parents))
        born_value, born_failed = evaluate(born)
        x = np.concatenate([x[top], born])
        value = np.concatenate([value[top], np.where(born_failed, -np.inf, born_value)])
    best = int(value.argmax())
    return float(value[best]), median, x[best]
