"""The surfaces of the tables with scale in them, in the form that tasks are cut out of.

Notations
    n    measured runs of a table
    v    natural values of points by role: log10 of the learning rate, log2 of alpha / rank
         (``ratio``), rank, batch size, steps and the share of adapted modules, and dropout
    x    natural values in the order of ``dimensions``, shape (N, P)

A table of some dozen runs cannot fix a Gaussian process in seven dimensions. A surface is a
parametric form (``Plateau``), whose parameters ``python -m studies.tables scale fit`` fits with a
prior from all tables, plus a Gaussian process (Matern 5/2, lengthscales given) over what the form
leaves of the measured runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from scipy.special import expit

from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.surfaces import DIVERGED
from optuna_lora_rl.learning.tables.surfaces import WORST
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.prior import coverage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna_lora_rl.learning.tables.dataset import Table

FITS = Path(__file__).resolve().parent / "tables" / "scaled.json"
LENGTHS = {
    "learning_rate": 0.7,
    "ratio": 2.5,
    "rank": 3.0,
    "share": 1.0,
    "dropout": 0.2,
    "batch_size": 2.5,
    "steps": 2.5,
}
"""Lengthscales of what the form leaves: decades of the rate, octaves, and dropout as it is."""

_LOG10_2, _NINE = math.log10(2.0), math.log(9.0)
# What tables and tuning contexts call the same.
_CONTEXT = {
    "hidden_size": "hidden_size",
    "model_layers": "layers",
    "model_parameters": "parameters",
    "examples": "examples",
    "mean_tokens": "tokens",
    "method": "method",
}
_LOGARITHMIC = ("learning_rate", "lora_rank", "alpha_ratio", "batch_size", "max_steps")
FEWEST = 8
TARGETS = ("qv", "attention", "mlp", "all-linear")


def natural(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What shapes ask of configurations, each of shape (n,).

    Args:
        parameters: Columns by name, as a table has them.
    """
    covers = np.array([coverage(name) for name in parameters["target_modules"]], dtype=float)
    if "layers" in parameters:
        covers *= [1.0 if name == "all" else coverage(name) for name in parameters["layers"]]
    return {
        "learning_rate": np.log10(parameters["learning_rate"]),
        "ratio": np.log2(parameters["alpha_ratio"]),
        "rank": np.log2(parameters["lora_rank"]),
        "share": np.log2(covers),
        "dropout": np.asarray(parameters["lora_dropout"], dtype=float),
        "batch_size": np.log2(parameters["batch_size"]),
        "steps": np.log2(parameters["max_steps"]),
    }


def quality(table: Table) -> np.ndarray:
    """Final quality of a table's runs, no worse than ``WORST``, shape (n,)."""
    last = table.quality[:, -1]
    found: np.ndarray = np.where(np.isfinite(last), np.maximum(last, WORST), WORST)
    return found


@dataclass(frozen=True)
class Plateau:
    """Quality as learning rates see it: nothing, a rise, a plateau, a fall.

    Attributes:
        rate: log10 of the best rate, the middle of the plateau, at alpha = 2 rank, rank 16, all
            linear modules and the middle steps and batch size.
        half: Decades from there to where a tenth of the rise is missing, and to where a tenth of
            the fall is done.
        widens: Exponent of the steps by which that grows: longer runs learn at lower rates, but
            do not bear higher ones.
        rising: Decades in which the rise goes from a half to .73 (a logistic curve's scale).
        falling: Likewise of the fall.
        drop: Quality that the fall takes.
        by_ratio: Exponents by which alpha / rank makes a learning rate effective,
        by_rank: the rank,
        by_size: the share of adapted modules,
        by_steps: the steps,
        by_batch: and one over the batch size.
        top: Quality of a large adapter at the plateau.
        lack: Share of it that an adapter of rank 1 on all modules lacks.
        scale: Octaves of size over which the lack falls by half.
        large: Quality by octave of size beyond rank 8.
        steps: Quality by octave of steps,
        batch: and of the batch size.
        dropout: What a dropout of .1 gains.
        middle_steps: log2 of the steps in the middle.
        middle_batch: log2 of the batch size in the middle.
    """

    rate: float
    half: float
    widens: float
    rising: float
    falling: float
    drop: float
    by_ratio: float
    by_rank: float
    by_size: float
    by_steps: float
    by_batch: float
    top: float
    lack: float
    scale: float
    large: float
    steps: float
    batch: float
    dropout: float
    middle_steps: float
    middle_batch: float

    def __call__(self, v: Mapping[str, np.ndarray]) -> np.ndarray:
        """Quality at points, shape (N,)."""
        steps, batch = v["steps"] - self.middle_steps, v["batch_size"] - self.middle_batch
        lift = self.by_ratio * (v["ratio"] - 1) + self.by_rank * (v["rank"] - 4)
        lift = lift + self.by_size * v["share"] + self.by_steps * steps - self.by_batch * batch
        off = v["learning_rate"] + _LOG10_2 * lift - self.rate
        half = np.maximum(self.half + _LOG10_2 * self.widens * steps, 0.0)
        size = v["rank"] + v["share"]
        high = self.top * (1 - self.lack * np.exp2(-size / self.scale))
        high = high + self.large * np.maximum(size - 3, 0) + self.steps * steps
        high = high + self.batch * batch + self.dropout * v["dropout"] / 0.1
        rises = expit((off + half) / self.rising + _NINE)
        quality: np.ndarray = high * rises
        quality -= self.drop * expit((off - half) / self.falling - _NINE)
        return quality


def correlation(v: dict[str, np.ndarray], w: dict[str, np.ndarray]) -> np.ndarray:
    """Of what the form leaves at two lots of points, shape (N, n)."""
    apart = [np.square((v[name][:, None] - w[name]) / length) for name, length in LENGTHS.items()]
    r = math.sqrt(5.0) * np.sqrt(sum(apart))
    near: np.ndarray = (1.0 + r + r * r / 3.0) * np.exp(-r)
    return near


@dataclass(frozen=True, eq=False)
class _Cost:
    """What a run costs: linear in the adapter, in the rows a batch, and in the work of a run."""

    weights: np.ndarray
    rows: int

    @classmethod
    def of(cls, table: Table) -> _Cost:
        from scipy.optimize import nnls

        rows = int(table.task.context["examples"])
        parts = _parts(natural(table.parameters), rows)
        weights, _ = nnls(parts / table.cost[:, None], np.ones(len(table)))
        return cls(weights, rows)

    def __call__(self, v: dict[str, np.ndarray]) -> np.ndarray:
        cost: np.ndarray = _parts(v, self.rows) @ self.weights
        return cost


def _parts(v: dict[str, np.ndarray], examples: int) -> np.ndarray:
    size = np.exp2(v["rank"] + v["share"])
    # A batch holds no more rows than there are.
    rows = np.minimum(np.exp2(v["batch_size"]), examples)
    work = rows * np.exp2(v["steps"])
    dropped = v["dropout"] > 0
    parts = [np.ones_like(size), size, rows, rows * size, work, work * size, work * dropped]
    # How much of the backward pass there is depends on the targets.
    parts += [work * (np.abs(v["share"] - math.log2(coverage(name))) < 1e-6) for name in TARGETS]
    return np.stack(parts, 1)


class ScaledSurface:
    """One table's surface as a ``ResponseSurface``, with what is known of its task.

    Args:
        table: The measured runs.
        fit: Its entry of the fits.

    Attributes:
        name: Of the table.
        context: What is known before the first trial, with the steps where they do not vary.
        noise: Deviation of a run, in quality.
        dimensions: What varies in the table, over the range that it has there.
    """

    def __init__(self, table: Table, fit: Mapping[str, Any]) -> None:
        self.name: str = table.task.name
        self.noise: float = fit["noise"]
        self.dimensions = _dimensions(table)
        # Parameters that do not vary in this table have one value.
        self._fixed = {
            name: table.parameters[name][0]
            for name in scaled.VARIED
            if name not in {one.name for one in self.dimensions}
        }
        self._v = natural(table.parameters)
        self._form = Plateau(**fit["form"])
        left = quality(table) - self._form(self._v)
        covariance = fit["left"] ** 2 * correlation(self._v, self._v)
        covariance[np.diag_indices_from(covariance)] += fit["noise"] ** 2
        self._weights = fit["left"] ** 2 * np.linalg.solve(covariance, left)
        self._cost = _Cost.of(table)
        known = {said: table.task.context[name] for name, said in _CONTEXT.items()}
        steps = self._fixed.get("max_steps")
        self.context = TuningContext(**known, steps=None if steps is None else int(steps))

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Final quality and divergence at natural values x, each of shape (N,)."""
        v = self._natural(x)
        value = self._form(v) + correlation(v, self._v) @ self._weights
        return np.clip(value, WORST, 1.0), value < DIVERGED

    def cost(self, x: np.ndarray) -> np.ndarray:
        """Counted cost at natural values x, shape (N,); 1 is the default at the most steps."""
        return self._cost(self._natural(x))

    def _natural(self, x: np.ndarray) -> dict[str, np.ndarray]:
        columns: dict[str, Any] = {
            name: np.full(len(x), value) for name, value in self._fixed.items()
        }
        for one, column in zip(self.dimensions, x.T, strict=True):
            columns[one.name] = column
            if one.name == "target_modules":
                columns[one.name] = [TARGETS[int(place)] for place in column]
        return natural(columns)


def _dimensions(table: Table) -> tuple[Dimension, ...]:
    dimensions = []
    for name in scaled.VARIED:
        values = table.parameters[name]
        if name == "target_modules":
            dimensions.append(Dimension(name, "categorical", choices=TARGETS))
        elif len(set(values.tolist())) > 1:
            kind = "int" if values.dtype.kind == "i" else "float"
            low, high = float(values.min()), float(values.max())
            low = 0.0 if name == "lora_dropout" else low
            dimensions.append(Dimension(name, kind, low, high, log=name in _LOGARITHMIC))
    return make_space(dimensions).dimensions


def load(split: str) -> list[ScaledSurface]:
    """The fitted surfaces of a split, of the tables of at least ``FEWEST`` runs.

    With fewer a surface says what all tables have in common and little of its own.
    """
    fits = json.loads(FITS.read_text(encoding="utf-8"))["tables"] if FITS.exists() else {}
    known = [table for table in scaled.load(split) if table.task.name in fits]
    return [ScaledSurface(one, fits[one.task.name]) for one in known if len(one) >= FEWEST]
