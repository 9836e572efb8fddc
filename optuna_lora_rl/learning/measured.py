"""Tasks cut out of measured response surfaces: a few parameters tuned, the others fixed.

Notations
    P     parameters that a surface was measured over, D of them tuned in a task
    x     points in the task's unit cube, shape (N, D)

A surface says what a real fine-tuning scored over the ranges in which it was measured. A task
tunes some of its parameters over part of their ranges, fixes the others somewhere plausible, and
mostly charges for the cost of a run, as the package's score does. In a third of the tasks the
learning rate's label is moved so that the best one lies where guides would look, as it does for
larger models, and in another third anywhere; so that the policy learns the shape of real surfaces
and not the scale of the models they were measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Protocol

import numpy as np
import torch

from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.prior import GUIDE_LR

# How often a parameter is tuned where a surface has it; the learning rate or the rank always is.
_TUNED = {
    "learning_rate": 0.96,
    "rank": 0.93,
    "alpha": 0.65,
    "alpha_ratio": 0.65,
    "dropout": 0.55,
    "targets": 0.55,
    "layers": 0.2,
    "batch_size": 0.35,
    "steps": 0.2,
    "weight_decay": 0.3,
}
# Half of the tasks tune what most studies do, over the whole ranges.
_WHOLE = 0.5
_WHOLE_TUNED = {
    "learning_rate": 1.0,
    "rank": 0.97,
    "alpha": 0.7,
    "alpha_ratio": 0.7,
    "dropout": 0.6,
    "targets": 0.75,
    "batch_size": 0.6,
}
# The package's default for what the cost of its default configuration takes from a quality of 1.
_COST_WEIGHT = 0.1


class ResponseSurface(Protocol):
    """What measured fine-tunings say about any configuration in their ranges.

    Attributes:
        name: of the measured task.
        dimensions: what it was measured over, with roles and ranges.
        noise: deviation between seeds, in the units of the value.
        context: what was known of model, data and run.
    """

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> TuningContext | None: ...
    @property
    def dimensions(self) -> tuple[Dimension, ...]: ...
    @property
    def noise(self) -> float: ...

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value (larger is better) and failure of configurations, each of shape (N,).

        Args:
            x: natural values in the order of ``dimensions``, shape (N, P); a parameter without
                order is given by the index of its choice in ``levels``.
        """

    def cost(self, x: np.ndarray) -> np.ndarray:
        """Cost of configurations (compute, memory, adapter) in any unit, shape (N,)."""


@dataclass(frozen=True)
class Slice:
    """A task cut out of a response surface.

    Args:
        surface: the measurements' surface.
        space: what is tuned.
        columns: column in the space of each of the surface's parameters, -1 where fixed.
        fixed: natural values of the fixed parameters, shape (P,).
        shift: decades by which the task's learning rates are labelled higher than measured.
        price: what the surface's unit of cost takes from the score, in units of value.
        fails: whether a run that diverges fails, rather than to end with a bad score.
    """

    surface: ResponseSurface
    space: Space
    columns: tuple[int, ...]
    fixed: np.ndarray
    shift: float
    price: float
    fails: bool = True

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and failures at x (N, D), each of shape (N,)."""
        natural = self.natural(x)
        value, failed = self.surface(natural)
        charge = self.price * self.surface.cost(natural) if self.price else 0.0
        return value - charge, failed & self.fails

    def known(self) -> dict[str, Any]:
        """What is known of model, data and run where the rates are those that were measured."""
        if self.shift:
            return {}
        fixed = {
            dimension.role: round(float(value))
            for dimension, value, column in zip(
                self.surface.dimensions, self.fixed, self.columns, strict=True
            )
            if column < 0 and dimension.role in ("steps", "batch_size")
        }
        known = self.surface.context.as_dict() if self.surface.context else {}
        return {**known, **{name: max(value, 1) for name, value in fixed.items() if name}}

    def charge(self, x: np.ndarray) -> np.ndarray:
        """What the score of x (N, D) is charged, in units of the value, shape (N,)."""
        return self.price * self.surface.cost(self.natural(x))

    def natural(self, x: np.ndarray) -> np.ndarray:
        """The surface's own coordinates of points x (N, D), shape (N, P)."""
        values = np.repeat(self.fixed[None], len(x), axis=0)
        alphas: tuple[int, np.ndarray] | None = None
        for j, (dimension, column) in enumerate(
            zip(self.surface.dimensions, self.columns, strict=True)
        ):
            if column < 0:
                continue
            tuned, u = self.space.dimensions[column], x[:, column]
            if tuned.role == "alpha" and dimension.role == "alpha_ratio":
                alphas = j, tuned.natural(u)
            elif dimension.is_ordered:
                values[:, j] = tuned.natural(u)
            else:
                places = np.array([dimension.levels.index(choice) for choice in tuned.levels])
                cell = np.clip((u * len(places)).astype(int), 0, len(places) - 1)
                values[:, j] = places[cell]
            if dimension.role == "learning_rate":
                values[:, j] *= 10.0**-self.shift
        if alphas is not None:
            j, alpha = alphas
            ratio, roles = self.surface.dimensions[j], [d.role for d in self.surface.dimensions]
            values[:, j] = (alpha / values[:, roles.index("rank")]).clip(ratio.low, ratio.high)
        return values


def draw_slice(rng: np.random.Generator, surfaces: Sequence[ResponseSurface]) -> Slice:
    """A random task on one of the surfaces."""
    surface = surfaces[int(rng.integers(len(surfaces)))]
    whole = rng.random() < _WHOLE
    chances, otherwise = (_WHOLE_TUNED, 0.05) if whole else (_TUNED, 0.3)
    chance = [chances.get(dimension.role or "", otherwise) for dimension in surface.dimensions]
    tuned = rng.random(len(chance)) < chance
    if not tuned.any():
        tuned[int(np.argmax(chance))] = True
    shift = _shift(rng, surface)
    dimensions: list[Dimension] = []
    columns: list[int] = []
    fixed = np.zeros(len(chance))
    for j, dimension in enumerate(surface.dimensions):
        fixed[j] = _usual(rng, dimension)
        columns.append(len(dimensions) if tuned[j] else -1)
        if tuned[j]:
            dimensions.append(_narrowed(rng, dimension, shift, whole=whole))
            ranked = any(d.role == "rank" for d in surface.dimensions)
            if dimension.role == "alpha_ratio" and ranked and rng.random() < 0.65:
                dimensions[-1] = _alpha(rng)
    price = _price(rng, surface)
    space = make_space(dimensions)
    fails = bool(rng.random() < 0.5)
    return Slice(surface, space, tuple(columns), fixed, shift, price, fails)


def _price(rng: np.random.Generator, surface: ResponseSurface) -> float:
    """What a unit of cost takes from the score.

    Nothing for a quarter of the tasks; for half about what the package's own score charges, the
    tenth of a value of 1 for the cost of its default configuration; for the rest anything.
    """
    kind = rng.random()
    if kind < 0.25:
        return 0.0
    if kind < 0.75:
        return float(rng.lognormal(np.log(_COST_WEIGHT), 0.6))
    spread, dearest = _sizes(surface)
    return float(rng.exponential(1.0)) * spread / dearest


def _usual(rng: np.random.Generator, dimension: Dimension) -> float:
    """Somewhere in the middle of a range, or any choice."""
    if not dimension.is_ordered:
        return float(rng.integers(len(dimension.levels)))
    if dimension.role in ("dropout", "weight_decay") and rng.random() < 0.6:
        return dimension.low
    u = dimension.snap(np.array([rng.uniform(0.25, 0.75)]))
    return float(dimension.natural(u)[0])


def _narrowed(
    rng: np.random.Generator, dimension: Dimension, shift: float, *, whole: bool
) -> Dimension:
    """Part of a measured range, at least half of it, or all; the learning rate relabelled."""
    if dimension.kind == "categorical":
        return dimension if dimension.is_ordered or whole else _fewer(rng, dimension)
    width = rng.uniform(0.5, 1.0) if rng.random() < 0.6 and not whole else 1.0
    start = rng.uniform(0.0, 1.0 - width)
    low, high = dimension.decode(start), dimension.decode(start + width)
    if dimension.role in ("dropout", "weight_decay"):
        low = dimension.low
    if dimension.role == "learning_rate":
        return replace(dimension, low=low * 10.0**shift, high=high * 10.0**shift)
    doubling = dimension.role in ("rank", "alpha", "batch_size")
    if doubling and dimension.kind == "int" and rng.random() < 0.4:
        powers = [int(2**k) for k in range(int(np.ceil(np.log2(low))), 13) if 2**k <= high]
        if len(powers) >= 2:
            return Dimension(
                dimension.name, "categorical", choices=tuple(powers), role=dimension.role
            )
    return replace(dimension, low=float(low), high=float(max(high, low)))


def _alpha(rng: np.random.Generator) -> Dimension:
    """Alpha itself, as most write it, where its ratio to the rank was measured."""
    low, high = 2.0 ** round(rng.uniform(0.0, 4.0)), 2.0 ** round(rng.uniform(5.0, 8.0))
    if rng.random() < 0.4:
        powers = tuple(int(2**k) for k in range(round(np.log2(low)), round(np.log2(high)) + 1))
        return Dimension("lora_alpha", "categorical", choices=powers)
    return Dimension("lora_alpha", "int", low, high, log=True)


def _fewer(rng: np.random.Generator, dimension: Dimension) -> Dimension:
    if len(dimension.choices) < 3 or rng.random() < 0.6:
        return dimension
    kept = sorted(rng.choice(len(dimension.choices), size=2, replace=False).tolist())
    return replace(dimension, choices=tuple(dimension.choices[k] for k in kept))


def _sample(
    surface: ResponseSurface, count: int = 512
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fixed even sample of a surface: natural values, values, failures."""
    net = torch.quasirandom.SobolEngine(len(surface.dimensions)).draw(count + 1)[1:].numpy()
    columns = []
    for j, dimension in enumerate(surface.dimensions):
        u = dimension.snap(net[:, j].astype(float))
        levels = len(dimension.levels) if not dimension.is_ordered else 0
        columns.append(np.floor(u * levels) if levels else dimension.natural(u))
    natural = np.stack(columns, 1)
    return natural, *surface(natural)


def _sizes(surface: ResponseSurface) -> tuple[float, float]:
    """Best less median value of a surface, and its largest cost."""
    natural, value, failed = _sample(surface)
    alive = np.sort(value[~failed])
    spread = float(alive[-1] - alive[(len(alive) - 1) // 2]) if len(alive) else 1.0
    return spread, float(surface.cost(natural).max())


def _shift(rng: np.random.Generator, surface: ResponseSurface) -> float:
    """Nothing for a third of the tasks; for a third what brings the best rates to where guides
    look; for the rest anything up to two and a half decades down.
    """
    column = [j for j, d in enumerate(surface.dimensions) if d.role == "learning_rate"]
    kind = rng.random()
    if not column or kind < 0.35:
        return 0.0
    if kind > 0.7:
        return float(rng.uniform(-2.5, 0.5))
    natural, value, failed = _sample(surface)
    best = np.argsort(np.where(failed, np.inf, -value), kind="stable")[:8]
    centre = float(np.sort(np.log10(natural[best, column[0]]))[3])
    return GUIDE_LR + float(rng.normal(0.05, 0.35)) - centre
