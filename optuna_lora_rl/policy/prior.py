"""What guides, published sweeps and a range itself say about a LoRA run before any result.

Every dimension gets a density over its unit interval, tabulated at ``NODES`` even places; the
prior of a configuration is their product, with alpha taken relative to the rank. It speaks only
where a parameter's role is known and the space looks like a LoRA one; elsewhere it is flat.

Evidence: guides start from rank 16-32, alpha = rank or twice that, all linear layers, no dropout,
learning rate 2e-4; in published sweeps of 28 large models a learning rate near 3e-4 with a large
rank is nearly best for most. A range is evidence as well: whoever writes 1e-4 ... 1e-1 does not
expect 2e-4, so the centre of the range pulls the guide's learning rate towards it. Where the
model, the data or the method are known, what follows from them
(:mod:`~optuna_lora_rl.policy.scaling`) takes the guides' place.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.scaling import Normal
from optuna_lora_rl.policy.scaling import expected_rate
from optuna_lora_rl.policy.scaling import less_rank
from optuna_lora_rl.policy.scaling import log10_rows
from optuna_lora_rl.policy.scaling import method_shift
from optuna_lora_rl.policy.scaling import more_dropout
from optuna_lora_rl.policy.scaling import smallness

NODES = 65
U = np.linspace(0.0, 1.0, NODES)

# log10 of the guides' learning rate, its spread over models, and how far (in decades) the centre
# of a range usually lies from the best value.
GUIDE_LR, GUIDE_LR_SPREAD, RANGE_SPREAD = math.log10(2.5e-4), 0.4, 0.7
# Rows of the sweep that is among the candidates: eight learning rates at three sizes of a run.
SWEEP = 24
# log2 of the rank and of the batch size.
GUIDE_RANK, GUIDE_BATCH = 4.0, 3.0
# log2 of alpha / rank: between 1 and 2, seldom beyond 1/2 or 8.
GUIDE_RATIO, GUIDE_RATIO_SPREAD = 0.8, 0.8

# Logarithm that makes a role's natural scale: equal steps matter about equally.
_NATURAL_LOG = {
    "learning_rate": 10.0,
    "rank": 2.0,
    "alpha": 2.0,
    "alpha_ratio": 2.0,
    "batch_size": 2.0,
    "steps": 2.0,
}
# Typical distance over which the score changes much, in natural units of the role: half way (in
# logarithms) from round numbers to what fits tasks of the measured training tables best, since
# larger models need not be as smooth as those that were measured.
_NATURAL_LENGTH = {
    "learning_rate": 0.85,
    "rank": 5.7,
    "alpha": 4.3,
    "alpha_ratio": 5.3,
    "batch_size": 6.3,
    "steps": 3.4,
}
# Roles that matter little: lengthscale as a share of their range; likewise. That of the targets is
# half as long: a set of modules that was tried with the wrong rest seems worse than it is, and at
# what fits best no study came back to it.
_LONG = {"dropout": 4.4, "weight_decay": 5.7, "warmup": 2.0, "targets": 1.2, "layers": 2.1}


def natural_table(dimension: Dimension) -> np.ndarray:
    """A role's natural value at each node, shape (NODES,).

    Decades for the learning rate, octaves for ranks, alphas, batch sizes and steps, the share of
    adapted layers for targets and layers, and the plain value for the rest.
    """
    role = dimension.role
    if not dimension.is_ordered:
        sizes = np.array([coverage(str(choice)) for choice in dimension.levels])
        cells = np.minimum((U * len(sizes)).astype(int), len(sizes) - 1)
        return sizes[cells]
    values = dimension.natural(U)
    if role in _NATURAL_LOG:
        smallest = 1e-9 if role == "learning_rate" else 0.1
        return np.log(np.maximum(values, smallest)) / math.log(_NATURAL_LOG[role])
    if role == "warmup" and values[-1] > 1:
        return values / values[-1]
    return values


def coverage(choice: str) -> float:
    """The share of a model's linear layers that a target preset or a module list adapts."""
    text = choice.lower().replace("_", "-")
    names = {
        "all-linear": 1.0, "all": 1.0, "linear": 1.0, "full": 1.0, "attention": 0.45,
        "attn": 0.45, "mlp": 0.55, "ffn": 0.55, "qv": 0.2, "q-v": 0.2, "qkv": 0.35,
        "qkvo": 0.45, "q": 0.1, "v": 0.1, "first-half": 0.5, "last-half": 0.5, "middle": 0.5,
    }  # fmt: skip
    if text in names:
        return names[text]
    parts = [part for part in re.split(r"[,;+|\s]+", text) if part]
    return min(1.0, len(parts) / 7) if len(parts) > 1 else 0.4


def _normal(x: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation


def learning_rate_density(
    natural: np.ndarray, expected: Normal | None = None, shift: float = 0.0
) -> np.ndarray:
    """Density of the best learning rate over a range, given in decades at the nodes.

    The guide's value, drawn towards the centre of the range (both as normal densities), plus a
    broad part for the cases in which the guide is wrong about the scale.

    Args:
        natural: the range at the nodes, in decades.
        expected: what follows from the model; by default the guides' value.
        shift: decades by which the method's rates lie above those of guides for SFT.
    """
    low, high = float(natural.min()), float(natural.max())
    centre, width = 0.5 * (low + high), max(high - low, 1e-3)
    believed = expected or Normal(GUIDE_LR + shift, GUIDE_LR_SPREAD)
    guide, spread = believed.deviation**-2, RANGE_SPREAD**-2
    mean = (guide * believed.mean + spread * centre) / (guide + spread)
    deviation = (guide + spread) ** -0.5
    broad = 0.3 * _normal(natural, centre, max(0.3, 0.35 * width))
    if expected is None and not low < mean < high:  # the guide says nothing about this range
        return broad
    return 0.7 * _normal(natural, mean, deviation) + broad


def density_table(
    dimension: Dimension, context: TuningContext | None = None, expected: Normal | None = None
) -> np.ndarray:
    """Density over the unit interval by role alone, shape (NODES,), mean 1.

    Args:
        dimension: the parameter.
        context: what is known of model, data and run.
        expected: log10 of the learning rate that follows from it.
    """
    x, role, few = natural_table(dimension), dimension.role, smallness(context)
    if role == "learning_rate":
        density = learning_rate_density(x, expected, method_shift(context).mean)
    elif role == "rank":
        density = _normal(x, 4.8 - less_rank(context), 1.2) + 0.15
    elif role == "alpha":
        density = _normal(x, 5.3, 1.3) + 0.1
    elif role == "alpha_ratio":
        density = _normal(x, GUIDE_RATIO, GUIDE_RATIO_SPREAD) + 0.05
    elif role == "dropout":
        density = np.exp(-np.abs(x - more_dropout(context)) / 0.05) + 0.15
    elif role in ("targets", "layers"):
        density = np.exp((1.5 - few) * x)
    elif role == "batch_size":
        density = _normal(x, GUIDE_BATCH, 1.3) + 0.1
    elif role == "weight_decay":
        density = np.exp(-x / 0.03) + 0.4
    elif role == "steps":
        density = np.exp(1.0 * U)
    else:
        density = np.ones(NODES)
    return density / density.mean()


def log_lengthscale(dimension: Dimension, n_dimensions: int) -> tuple[float, float]:
    """Mean and deviation of the log lengthscale along a dimension, in its unit coordinate."""
    if dimension.role in _NATURAL_LENGTH and dimension.is_ordered:
        natural = natural_table(dimension)
        width = max(float(natural[-1] - natural[0]), 1e-3)
        length = _NATURAL_LENGTH[dimension.role] / width
        return math.log(min(max(length, 0.1), 4.0)), 0.7
    if dimension.role in _LONG:
        return math.log(_LONG[dimension.role]), 0.9
    return math.log(0.55) + 0.35 * math.log(max(n_dimensions, 1)), 1.0


@dataclass(frozen=True)
class SpacePrior:
    """The prior of one space.

    Args:
        space: the dimensions.
        is_lora: whether the guides' prior applies.
        log_density: shape (d, NODES); flat rows where nothing is known.
        natural: natural values at the nodes, shape (d, NODES); only rows with a role mean much.
        context: what is known of model, data and run.
        expected: log10 of the learning rate that follows from it, for alpha = 2 rank.
        rows: log10 of the examples that a run is taken to see.
    """

    space: Space
    is_lora: bool
    log_density: np.ndarray
    natural: np.ndarray
    context: TuningContext | None = None
    expected: Normal | None = None
    rows: float | None = None

    def log_density_given(self, given: np.ndarray) -> np.ndarray:
        """Densities that know a configuration's rank when they judge its alpha."""
        rank, alpha = (self.space.role_columns.get(role, -1) for role in ("rank", "alpha"))
        if min(rank, alpha) < 0 or not self.is_lora or np.isnan(given[rank]):
            return self.log_density
        log_rank = np.interp(given[rank], U, self.natural[rank])
        z = (self.natural[alpha] - log_rank - GUIDE_RATIO) / GUIDE_RATIO_SPREAD
        relative = self.log_density.copy()
        relative[alpha] = np.log(np.exp(-0.5 * z * z) + 0.01)
        return relative

    def point(self, given: np.ndarray | None = None) -> np.ndarray:
        """The guides' configuration, shape (d,), round what is given (NaN where it is not)."""
        point = np.full(len(self.space), np.nan) if given is None else given.copy()
        order = sorted(range(len(point)), key=lambda c: self.space.dimensions[c].role == "alpha")
        for column in order:  # alpha last: it goes by the rank
            if np.isnan(point[column]):
                point[column] = self._usual(column, point)
                point[column] = self.space.snap(point)[column]
        return point

    def _usual(self, column: int, point: np.ndarray) -> float:
        dimension = self.space.dimensions[column]
        if not self.is_lora or dimension.role is None:
            return 0.5 if dimension.is_ordered else float(dimension.grid()[0])
        natural, rank = self.natural[column], self.space.role_columns.get("rank")
        if dimension.role == "rank":
            return float(np.interp(GUIDE_RANK - less_rank(self.context), natural, U))
        if dimension.role == "batch_size":
            return float(np.interp(GUIDE_BATCH, natural, U))
        if dimension.role == "alpha" and rank is not None:
            log_rank = np.interp(point[rank], U, self.natural[rank])
            return float(np.interp(log_rank + 1.0, natural, U))
        best = np.flatnonzero(self.log_density[column] >= self.log_density[column].max() - 1e-9)
        return float(U[best[len(best) // 2]])

    def sweep(self) -> np.ndarray:
        """An expert's sweep, shape (SWEEP, d): learning rates at three sizes of a run.

        The guides' learning rate and the eighths of its range, each with the guides' values of
        the rest, with a small adapter and batch, and with a large adapter.
        """
        rates = self.space.role_columns.get("learning_rate")
        points = []
        for size in self._sizes():
            rows = np.repeat(self.point(size)[None], SWEEP // 3, axis=0)
            if rates is not None:
                rows[1:, rates] = np.arange(1, 8) / 8
            points.append(rows)
        return self.space.snap(np.concatenate(points))

    def _sizes(self) -> list[np.ndarray]:
        """What a usual, a small and a large run fix, each of shape (d,), NaN where nothing."""
        usual, small, large = (np.full(len(self.space), np.nan) for _ in range(3))
        if not self.is_lora:
            return [usual, small, large]
        columns = self.space.role_columns
        for role, less, more in (("rank", 2.0, 6.0), ("batch_size", 1.0, GUIDE_BATCH)):
            if role in columns:
                natural = self.natural[columns[role]]
                small[columns[role]] = np.interp(less, natural, U)
                large[columns[role]] = np.interp(more, natural, U)
        if "targets" in columns:
            natural = self.natural[columns["targets"]]
            for fixed, share in ((small, natural.min()), (large, natural.max())):
                places = np.flatnonzero(natural == share)
                fixed[columns["targets"]] = U[places[len(places) // 2]]
        return [usual, small, large]


def space_prior(space: Space, context: TuningContext | None = None) -> SpacePrior:
    """Tabulate the prior of a space, where something is known of model, data and run by that."""
    natural, density = np.ones((len(space), NODES)), np.ones((len(space), NODES))
    for column, dimension in enumerate(space.dimensions):
        natural[column] = natural_table(dimension)
    rows = log10_rows(context, space, _length_of_run(space, natural))
    expected = expected_rate(context, rows)
    for column, dimension in enumerate(space.dimensions):
        if space.is_lora:
            density[column] = density_table(dimension, context, expected)
    return SpacePrior(space, space.is_lora, np.log(density), natural, context, expected, rows)


def _length_of_run(space: Space, natural: np.ndarray) -> dict[str, float]:
    """log2 of the steps and of the batch size that the guides' configuration has, where tuned."""
    columns = space.role_columns
    found = {}
    if "steps" in columns:
        found["steps"] = float(natural[columns["steps"], -1])
    if "batch_size" in columns:
        table = natural[columns["batch_size"]]
        found["batch_size"] = float(min(max(GUIDE_BATCH, table.min()), table.max()))
    return found
