"""The family of response surfaces that a LoRA study is expected to have, and draws from it.

Notations
    M, N    surfaces and points
    v       natural values of the roles at points, shape (N,) each; see ``Layout.natural``

A ridge between learning rate, alpha / rank, rank, share of adapted layers, steps and batch size;
a cliff beyond it; rank and targets that saturate and may cost; small data that overfits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scaling import Normal
from optuna_lora_rl.policy.scaling import method_shift
from optuna_lora_rl.policy.scaling import overfitting
from optuna_lora_rl.policy.scaling import smallness

if TYPE_CHECKING:
    from optuna_lora_rl.policy.context import TuningContext
    from optuna_lora_rl.policy.layout import Layout
    from optuna_lora_rl.policy.layout import Points

# How often a range is drawn round the best rate; how often the guides' rate is right, how closely
# and by how much too low (decades); likewise where it is not.
_BELIEVED, _GUIDES_RIGHT = 0.65, 0.4
_NEAR_GUIDES, _FROM_GUIDES = (0.1, 0.4), (0.3, 1.2)
# How often what follows from a known model is right, and how far off it is where it is not.
_MODEL_RIGHT, _MODEL_WRONG = 0.85, 0.6
# Decades from a range's centre to the best rate, mean and deviation, on the measured tables.
_TABLES_CENTRE = (0.4, 0.4)
# What makes a learning rate effective on them, on average: exponents of alpha / rank, rank,
# share of adapted layers, steps, and one over the batch size.
_TABLES_LIFT = (0.64, 0.57, 0.5, 0.5, 0.06)
_LOG10_2 = math.log10(2.0)
_RATE, _ALPHA = ROLES.index("learning_rate"), ROLES.index("alpha")
# Natural values of what a space does not tune.
USUAL = {
    "learning_rate": GUIDE_LR,
    "rank": 4.0,
    "alpha": 5.0,
    "alpha_ratio": 1.0,
    "dropout": 0.0,
    "targets": 1.0,
    "layers": 1.0,
    "batch_size": 3.0,
    "steps": 6.0,
}
_Values = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Shapes:
    """Parameters of M surfaces, each of shape (M,), single precision.

    Args:
        peak: log10 of the best effective learning rate.
        by_ratio: exponents by which alpha / rank makes a learning rate effective,
        by_rank: the rank,
        by_size: the share of adapted layers,
        by_steps: the steps,
        by_batch: and one over the batch size.
        below: width of the ridge below the peak, in decades.
        above: above it.
        flat: how far a surface levels off away from the ridge: 0 quadratic, 1 bounded.
        cliff: decades above the peak at which runs diverge.
        gain: weight of the capacity.
        half: log2 of the size (rank times share of layers) at which it is lacking by that.
        scale: octaves over which the lack halves.
        steps: gain by an octave of steps.
        batch: likewise of the batch size.
        overfit: weight of overfitting.
        onset: log2 of the size at which it begins.
        dropout: what a dropout of 0.1 costs.
        cost: what an adapter of rank 16 costs.
        compute: what 64 steps of 8 examples cost.
    """

    peak: np.ndarray
    by_ratio: np.ndarray
    by_rank: np.ndarray
    by_size: np.ndarray
    by_steps: np.ndarray
    by_batch: np.ndarray
    below: np.ndarray
    above: np.ndarray
    flat: np.ndarray
    cliff: np.ndarray
    gain: np.ndarray
    half: np.ndarray
    scale: np.ndarray
    steps: np.ndarray
    batch: np.ndarray
    overfit: np.ndarray
    onset: np.ndarray
    dropout: np.ndarray
    cost: np.ndarray
    compute: np.ndarray

    def __len__(self) -> int:
        return len(self.peak)

    def take(self, rows: np.ndarray) -> Shapes:
        """Some of the surfaces."""
        return Shapes(*(getattr(self, one.name)[rows] for one in fields(self)))

    def with_(self, other: Shapes) -> Shapes:
        """These surfaces, then those."""
        pairs = ((getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return Shapes(*map(np.concatenate, pairs))

    def lift(self, v: _Values) -> np.ndarray:
        """Decades by which the effective learning rate lies above the plain one, (M, N)."""
        powers = [self.by_ratio, self.by_rank, self.by_size, self.by_steps, self.by_batch]
        lifted: np.ndarray = np.stack(powers, 1) @ _decades(v)
        return lifted

    def __call__(self, v: _Values) -> np.ndarray:
        """Values at natural values v of N points, in arbitrary units, shape (M, N)."""
        each = {one.name: getattr(self, one.name)[:, None] for one in fields(self)}
        off = self.lift(v)
        off += v["learning_rate"]
        off -= each["peak"]
        z = off / np.where(off < 0, each["below"], each["above"])
        z *= z
        z *= 0.5
        value: np.ndarray = each["flat"] * np.expm1(-z)
        value -= (1 - each["flat"]) * np.minimum(z, 4)
        off -= each["cliff"]
        value -= np.where(off > 0, 1 + 4 * off, 0)
        size = v["rank"] + v["share"]
        # Most points share their size: a column for each size is enough.
        sizes, which = np.unique(size, return_inverse=True)
        lack = each["gain"] * np.minimum(np.exp2((each["half"] - sizes) / each["scale"]), 4)
        lack += each["cost"] * np.minimum(np.exp2(sizes - 4), 64)
        value -= lack[:, which]
        self._add_length(value, v, each)
        some = np.flatnonzero(self.overfit > 0)
        excess = np.logaddexp(0, size + v["steps"] - 6 - each["onset"][some])
        excess *= 1 - 0.5 * np.minimum(v["dropout"] / 0.1, 1)
        value[some] -= each["overfit"][some] * excess
        if v["dropout"].any():
            value -= each["dropout"] * (10 * v["dropout"])
        return value

    def _add_length(self, value: np.ndarray, v: _Values, each: _Values) -> None:
        """What steps and batch size gain and cost, where a space tunes them."""
        steps, batch = v["steps"] - 6, v["batch_size"] - 3
        works, which = np.unique(steps + batch, return_inverse=True)
        if len(works) > 1:
            value -= (each["compute"] * np.minimum(np.exp2(works), 64))[:, which]
            value += each["steps"] * steps + each["batch"] * batch


def _decades(v: _Values) -> np.ndarray:
    """What each exponent is of, in decades, single precision, shape (5, N)."""
    octaves = [v["ratio"] - 1, v["rank"] - 4, v["share"], v["steps"] - 6, 3 - v["batch_size"]]
    return np.stack(octaves) * np.float32(_LOG10_2)


def tables_lift(v: _Values) -> np.ndarray:
    """``Shapes.lift`` as it is on average over the measured tables, shape (N,)."""
    return np.array(_TABLES_LIFT) @ _decades(v)


def natural_values(points: Points, layout: Layout) -> _Values:
    """What the surfaces ask of points, by role, shape (N,) each, in single precision."""
    v = {}
    for role, usual in USUAL.items():
        number = ROLES.index(role)
        tuned = layout.column[number] >= 0
        v[role] = points.roles[:, number] if tuned else np.full(len(points), usual)
    v["ratio"] = v["alpha"] - v["rank"] if layout.column[_ALPHA] >= 0 else v["alpha_ratio"]
    v["share"] = sum(np.log2(np.maximum(v[role], 0.05)) for role in ("targets", "layers"))
    return {name: value.astype(np.float32) for name, value in v.items()}


def draw_shapes(rng: np.random.Generator, layout: Layout, count: int) -> Shapes:
    """Random surfaces of a LoRA study over a space, half like the tables and half broader."""
    half = count // 2
    parts = _like_tables(rng, half), _broad(rng, count - half, layout.context)
    rates = (
        _best_rates(rng, layout, half, *_TABLES_CENTRE),
        _best_rates(rng, layout, count - half, 0.0, None),
    )
    one, other = (
        Shapes(peak=rate.astype(np.float32), **{k: v.astype(np.float32) for k, v in part.items()})
        for part, rate in zip(parts, rates, strict=True)
    )
    shapes = one.with_(other)
    if layout.charged:  # then the surfaces are of quality alone
        none = np.zeros_like(shapes.cost)
        shapes = replace(shapes, cost=none, compute=none)
    # The rates are best at the guides' values of the rest.
    lift = shapes.lift(natural_values(layout.usual, layout))[:, 0]
    return replace(shapes, peak=shapes.peak + lift)


def _like_tables(rng: np.random.Generator, count: int) -> _Values:
    """As this form fits the training split's tables (``studies/bank_shapes.py``): R2 .84 to .97.

    What a fit says of small data is left out: none of the tables overfitted.
    """
    ratio, rank, size, steps, batch = _TABLES_LIFT
    lean = rng.normal(0.0, 0.5, count)  # ridges that are wide below their peak are steep above
    price = np.exp(rng.normal(math.log(0.24), 0.7, count)) * (rng.random(count) < 0.75)
    return {
        "by_ratio": rng.normal(ratio, 0.1, count),
        "by_rank": rng.normal(rank, 0.15, count),
        "by_size": rng.normal(size, 0.15, count),
        "by_steps": rng.normal(steps, 0.3, count),
        "by_batch": rng.normal(batch, 0.12, count),
        "below": 0.7 * np.exp(lean),
        "above": 0.85 * np.exp(rng.normal(-lean, 0.35)),
        "flat": rng.beta(1.5, 0.7, count),
        "cliff": rng.uniform(1.4, 3.0, count),
        "gain": np.exp(rng.normal(math.log(0.17), 0.5, count)),
        "half": rng.normal(0.6, 1.0, count),
        "scale": rng.uniform(3.0, 8.0, count),
        "steps": np.abs(rng.normal(0.1, 0.03, count)),
        "batch": rng.normal(0.04, 0.02, count),
        "overfit": np.zeros(count),
        "onset": np.zeros(count),
        "dropout": rng.normal(0.005, 0.01, count),
        "cost": 0.35 * price,
        "compute": 0.5 * price,
    }


def _broad(rng: np.random.Generator, count: int, context: TuningContext | None) -> _Values:
    """Whatever a LoRA run may be: with a cliff or without, costly or not, on little data."""
    # The fewer examples, the more often and the sooner a larger adapter overfits.
    small, sooner = overfitting(context), 2.5 * smallness(context)

    def some(share: float) -> np.ndarray:
        return rng.random(count) < share

    return {
        "by_ratio": rng.normal(0.65, 0.2, count),
        "by_rank": rng.normal(0.3, 0.3, count),
        "by_size": rng.normal(0.2, 0.25, count),
        "by_steps": rng.normal(0.3, 0.2, count),
        "by_batch": rng.normal(0.3, 0.3, count),
        "below": np.exp(rng.normal(math.log(0.55), 0.4, count)),
        "above": np.exp(rng.normal(math.log(0.45), 0.4, count)),
        "flat": rng.beta(0.8, 0.8, count),
        "cliff": np.where(some(0.7), rng.uniform(0.3, 1.6, count), 9.0),
        "gain": np.exp(rng.normal(math.log(0.12), 0.8, count)) * some(0.9),
        "half": rng.uniform(0.0, 5.0, count),
        "scale": rng.uniform(0.7, 4.0, count),
        "steps": np.abs(rng.normal(0.0, 0.05, count)),
        "batch": rng.normal(0.0, 0.03, count),
        "overfit": some(small) * rng.uniform(0.03, 0.25, count),
        "onset": rng.uniform(0.0, 5.0, count) - sooner,
        "dropout": np.abs(rng.normal(0.0, 0.05, count)),
        "cost": some(0.65) * rng.exponential(0.06, count),
        "compute": some(0.5) * rng.exponential(0.05, count),
    }


def _best_rates(
    rng: np.random.Generator, layout: Layout, count: int, up: float, spread: float | None
) -> np.ndarray:
    """log10 of the best learning rate given the range, shape (count,).

    Args:
        rng: of the random numbers.
        layout: of the space.
        count: how many.
        up: decades from a range's centre to the rate that its writer believed to be best.
        spread: their deviation; by default it grows with the range.
    """
    near, far, right = _beliefs(layout)
    if layout.column[_RATE] < 0:
        return rng.normal(*far, count)
    table = layout.natural[_RATE]
    low, centre, high = table[0], table[NODES // 2], table[-1]
    if spread is None:
        spread = 0.2 + 0.12 * min(high - low, 6.0)
    rate = np.linspace(max(low, centre - 4.0) - 0.3, high + 0.3, 512)
    density = right * _bell(rate, *near) + (1 - right) * _bell(rate, *far)
    density *= _BELIEVED * _bell(rate, centre + up, spread) + (1 - _BELIEVED) * _bell(
        centre, GUIDE_LR, spread
    )
    share = np.cumsum(density + 1e-300)
    even = (rng.permutation(count) + 0.5) / max(count, 1)
    return np.interp(even, share / share[-1], rate)


def _beliefs(layout: Layout) -> tuple[Normal, Normal, float]:
    """What is believed of the best rate when it is right, when not, and how often it is right.

    The guides, or what follows from the model where it is known.
    """
    shift = method_shift(layout.context)
    if layout.expected is None:
        near, far = (
            Normal(GUIDE_LR + up + shift.mean, math.hypot(deviation, shift.deviation))
            for up, deviation in (_NEAR_GUIDES, _FROM_GUIDES)
        )
        return near, far, _GUIDES_RIGHT
    mean, deviation = layout.expected
    return layout.expected, Normal(mean, _MODEL_WRONG + deviation), _MODEL_RIGHT


def _bell(x: np.ndarray | float, mean: float, deviation: float) -> np.ndarray:
    bell: np.ndarray = np.exp(-0.5 * np.square((x - mean) / deviation)) / deviation
    return bell
