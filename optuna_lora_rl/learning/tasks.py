"""Tasks: a search space, a surface over it, its noise, and what is best there.

A task's space and truth are drawn together, since in life they hang together: whoever expects a
learning rate writes a range round it, and is sometimes wrong. In two LoRA tasks of five the best
learning rate is far from the guides' (up to two decades), in a tenth of the LoRA spaces the
surface knows nothing of LoRA, and a quarter of all spaces are not LoRA ones. Where measured
response surfaces are given, part of the LoRA tasks are cut out of them. Some tasks carry a
constraint, such as a largest adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.learning.measured import ResponseSurface
from optuna_lora_rl.learning.measured import Slice
from optuna_lora_rl.learning.measured import draw_slice
from optuna_lora_rl.learning.measured import evaluate
from optuna_lora_rl.learning.surfaces import Surface
from optuna_lora_rl.learning.surfaces import draw_surface
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import layout_of
from optuna_lora_rl.policy.layout import stack
from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES

MAX_DIMENSIONS = 10
_TARGETS = ("qv", "attention", "mlp", "all-linear")
_LAYERS = ("all", "first-half", "last-half", "middle")
GROUPS = ("usual_scale", "other_scale", "measured", "not_lora")
# Decades from the guides' learning rate beyond which a task's scale is another one.
_OTHER_SCALE = 0.7
_CONSTRAINED = 0.08
# Maps points (1, N, D) to values and failures, each (1, N).
_Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Tasks:
    """A batch of tasks.

    Args:
        spaces: the search spaces.
        layout: of the spaces.
        surface: what their configurations score.
        slices: of the tasks cut out of measurements, which overrule ``surface``; else ``None``.
        best: the largest value found by a long search, shape (B,).
        median: the median over uniform configurations that do not fail, shape (B,).
        noise: deviation of a run, in units of ``best - median``, shape (B,).
        limit: largest value of the constrained quantity, infinite without constraint, (B,).
        truth: what the critic may know while training, shape (B, P).
    """

    spaces: tuple[Space, ...]
    layout: Layout
    surface: Surface
    slices: tuple[Slice | None, ...]
    best: Tensor
    median: Tensor
    noise: Tensor
    limit: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.best)

    def __getitem__(self, rows: Tensor) -> Tasks:
        tuples = {"spaces", "slices"}
        chosen = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in tuples
        }
        order = rows.tolist()
        return Tasks(
            spaces=tuple(self.spaces[i] for i in order),
            slices=tuple(self.slices[i] for i in order),
            **chosen,
        )

    @property
    def floor(self) -> Tensor:
        """Regret that is as good as none, shape (B,): half the noise, at least 0.02."""
        return (0.5 * self.noise).clamp_min(0.02)

    @property
    def constrained(self) -> Tensor:
        """Which tasks have a constraint, shape (B,)."""
        return self.limit < torch.inf

    @property
    def groups(self) -> Tensor:
        """Index into ``GROUPS`` of each task, shape (B,).

        A LoRA space over a surface that knows nothing of LoRA counts as another scale: the
        guides are wrong there, too.
        """
        is_lora, shift, _, lora_space = self.truth.T
        other = (shift.abs() > _OTHER_SCALE) | (is_lora < 0.5)
        group = torch.where(other, GROUPS.index("other_scale"), GROUPS.index("usual_scale"))
        group = torch.where(lora_space > 0.5, group, GROUPS.index("not_lora"))
        measured = torch.tensor([cut is not None for cut in self.slices])
        return torch.where(measured, GROUPS.index("measured"), group)

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw values and failures at x, each (B, N)."""
        value, failed = self.surface(x, self.layout)
        rows = [row for row, cut in enumerate(self.slices) if cut is not None]
        if rows:
            cuts = [cut for cut in self.slices if cut is not None]
            value[rows], failed[rows] = evaluate(cuts, x[rows])
        return value, failed

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise-free scores (1 the best known, 0 the median) and failures, each (B, N)."""
        value, failed = self.value(x)
        span = (self.best - self.median)[:, None]
        return (value - self.median[:, None]) / span, failed

    def excess(self, x: Tensor) -> Tensor:
        """The constrained quantity less its limit, kept when <= 0, shape (B, N); NaN without."""
        over = self.surface.demand(x, self.layout) - self.limit[:, None]
        return torch.where(self.constrained[:, None], over, torch.nan)


def draw_tasks(
    count: int,
    seed: int,
    surfaces: Sequence[ResponseSurface] = (),
    measured: float = 0.65,
    *,
    constrained: bool = True,
) -> Tasks:
    """Random tasks; the same seed and surfaces give the same tasks.

    Args:
        count: how many.
        seed: of everything drawn.
        surfaces: measured ones to cut tasks out of; none for synthetic tasks only.
        measured: share of the LoRA tasks that are measured ones, where there are surfaces.
        constrained: whether some have a constraint; without, the same tasks lose it.
    """
    rng = np.random.default_rng(seed)
    drawn: list[Tasks] = []
    while len(drawn) < count:
        task = _draw_task(rng, surfaces, measured if surfaces else 0.0, constrained)
        if float(task.best - task.median) > 1e-3:
            drawn.append(task)
    return join(drawn)


def join(tasks: Sequence[Tasks]) -> Tasks:
    """Several batches as one, padded to ``MAX_DIMENSIONS`` columns."""
    surfaces = [task.surface for task in tasks]
    joined = {
        f.name: torch.cat([_pad(getattr(s, f.name), f.name) for s in surfaces])
        for f in fields(Surface)
    }
    return Tasks(
        spaces=tuple(space for task in tasks for space in task.spaces),
        layout=stack([task.layout for task in tasks], MAX_DIMENSIONS),
        surface=Surface(**joined),
        slices=tuple(cut for task in tasks for cut in task.slices),
        best=torch.cat([task.best for task in tasks]),
        median=torch.cat([task.median for task in tasks]),
        noise=torch.cat([task.noise for task in tasks]),
        limit=torch.cat([task.limit for task in tasks]),
        truth=torch.cat([task.truth for task in tasks]),
    )


def _pad(tensor: Tensor, name: str) -> Tensor:
    if name not in ("idle", "places", "W"):
        return tensor
    missing = MAX_DIMENSIONS - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing))


def _draw_task(
    rng: np.random.Generator,
    surfaces: Sequence[ResponseSurface],
    measured: float,
    constrained: bool,
) -> Tasks:
    lora_space = rng.random() < 0.75
    peak = _draw_peak(rng)
    cut = draw_slice(rng, surfaces) if lora_space and rng.random() < measured else None
    if cut is not None:
        space = cut.space
    else:
        space = make_space(_lora_dimensions(rng, peak) if lora_space else _other_dimensions(rng))
    layout = layout_of(space)
    is_lora = lora_space and (cut is not None or rng.random() < 0.9)
    surface = draw_surface(rng, layout, is_lora=is_lora, peak=peak)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = float(np.exp(rng.uniform(np.log(0.003), np.log(0.08))))
    one = torch.ones(1, dtype=torch.float64)
    limit = torch.inf * one
    if rng.random() < _CONSTRAINED:
        sample = layout.snap(uniform_points(layout, 256, generator))
        quantile = rng.uniform(0.3, 0.7)
        if constrained:
            limit = torch.quantile(surface.demand(sample, layout), quantile, dim=1)
    task = Tasks(
        spaces=(space,),
        layout=layout,
        surface=surface,
        slices=(cut,),
        best=one,
        median=0.0 * one,
        noise=noise * one,
        limit=limit,
        truth=torch.zeros((1, 4)),
    )
    task.best, task.median, place = _search(_allowed(task), layout, generator)
    if cut is not None:  # the seeds' noise, or more: fewer evaluation examples are noisier
        span = float(task.best - task.median)
        task.noise = (task.noise.clamp_min(cut.surface.noise / max(span, 1e-9))).clamp_max(0.3)
    lr = float(layout.role_values(place)[0, 0, ROLES.index("learning_rate")])
    known = is_lora and bool(layout.has_role[0, ROLES.index("learning_rate")])
    truth = [float(is_lora), (lr - GUIDE_LR) * known, float(task.noise.log()), float(lora_space)]
    task.truth = torch.tensor([truth], dtype=torch.float32)
    return task


def _allowed(task: Tasks) -> _Evaluate:
    """The task's value where the constraint is kept."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        value, failed = task.value(x)
        return value, failed | (task.excess(x).nan_to_num(-1.0) > 0)

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
    return dimensions[:MAX_DIMENSIONS]


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
    dimensions = [_plain(rng, f"x{k}") for k in range(int(rng.integers(1, MAX_DIMENSIONS - 2)))]
    if rng.random() < 0.5:
        low = rng.uniform(-6.0, -3.0)
        high = low + rng.uniform(1.5, 5.0)
        dimensions.append(Dimension("learning_rate", "float", 10.0**low, 10.0**high, log=True))
        if rng.random() < 0.5:
            dimensions.append(_octaves(rng, "batch_size", (2.0, 5.0), (6.0, 9.0)))
        if rng.random() < 0.5:
            dimensions.append(Dimension("dropout", "float", 0.0, 0.5))
    return dimensions[:MAX_DIMENSIONS]


def _search(
    evaluate: _Evaluate, layout: Layout, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Best value and median of a surface, each (1,), and the best point, (1, 1, D)."""
    x = layout.snap(uniform_points(layout, 1024, generator))
    value, failed = evaluate(x)
    alive = value[~failed]
    median = alive.median() if len(alive) else value.median()
    value = torch.where(failed, -torch.inf, value)
    for turn in range(6):
        top = value.topk(16, dim=1).indices[0]
        parents = x[:, top].repeat(1, 8, 1)
        scale = 0.25 * 0.5**turn
        step = torch.randn(parents.shape, generator=generator, dtype=torch.float64) * scale
        chosen = torch.rand(parents.shape, generator=generator, dtype=torch.float64) < 0.4
        jump = torch.rand(parents.shape, generator=generator, dtype=torch.float64)
        moved = torch.where(layout.unordered[:, None], jump, parents + step)
        born = layout.snap(torch.where(chosen, moved, parents))
        born_value, born_failed = evaluate(born)
        x = torch.cat([x[:, top], born], 1)
        value = torch.cat([value[:, top], torch.where(born_failed, -torch.inf, born_value)], 1)
    best = value.amax(1)
    return best, median[None], x[:, value.argmax(1)]
