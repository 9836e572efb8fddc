"""The surfaces of the tables with scale in them, in the form that tasks are cut out of.

Notations
    n    measured runs of a table
    v    natural values of points by role, as ``policy.lora_surfaces.Shapes`` asks for them
    x    natural values in the order of ``dimensions``, shape (N, P)

A table of some dozen runs cannot fix a Gaussian process in seven dimensions. A surface is the
parametric form of LoRA surfaces (a ridge of learning rates, capacity, length), whose parameters
``python -m studies.tables scale`` fits with a prior from all tables, plus a Gaussian process
(Matern 5/2, lengthscales given) over what the form leaves of the measured runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.lora_surfaces import Shapes
from optuna_lora_rl.policy.prior import coverage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna_lora_rl.learning.tables.dataset import Table

FITS = Path(__file__).resolve().parent / "tables" / "scaled.json"
WORST, DIVERGED = -0.5, -0.05
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

_LOGARITHMIC = ("learning_rate", "lora_rank", "alpha_ratio", "batch_size", "max_steps")
TARGETS = ("qv", "attention", "mlp", "all-linear")


def natural(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What shapes ask of configurations, each of shape (n,).

    Args:
        parameters: Columns by name, as a table has them.
    """
    covers = np.array([coverage(name) for name in parameters["target_modules"]], dtype=float)
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


def shape(fit: Mapping[str, Any]) -> Shapes:
    """The single shape of a table's fit."""
    return Shapes(**{name: np.array([value]) for name, value in fit["shape"].items()})


def form(fit: Mapping[str, Any], v: dict[str, np.ndarray]) -> np.ndarray:
    """Quality by the parametric form alone, shape (N,)."""
    values: np.ndarray = fit["offset"] + fit["span"] * shape(fit)(v)[0]
    return values


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
    """

    def __init__(self, table: Table, fit: Mapping[str, Any]) -> None:
        self.name: str = table.task.name
        self.context: dict[str, Any] = dict(table.task.context)
        self.noise: float = fit["noise"]
        self.dimensions = _dimensions(table)
        # Parameters that do not vary in this table have one value.
        self._fixed = {
            name: table.parameters[name][0]
            for name in scaled.VARIED
            if name not in {one.name for one in self.dimensions}
        }
        self._fit = fit
        self._v = natural(table.parameters)
        left = quality(table) - form(fit, self._v)
        covariance = fit["left"] ** 2 * correlation(self._v, self._v)
        covariance[np.diag_indices_from(covariance)] += fit["noise"] ** 2
        self._weights = fit["left"] ** 2 * np.linalg.solve(covariance, left)
        self._cost = _Cost.of(table)
        if steps := self._fixed.get("max_steps"):
            self.context["steps"] = int(steps)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Final quality and divergence at natural values x, each of shape (N,)."""
        v = self._natural(x)
        value = form(self._fit, v) + correlation(v, self._v) @ self._weights
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
    """The surfaces of a split of the tables that have been fitted; none where there are none."""
    fits = json.loads(FITS.read_text(encoding="utf-8"))["tables"] if FITS.exists() else {}
    known = [table for table in scaled.load(split) if table.task.name in fits]
    return [ScaledSurface(table, fits[table.task.name]) for table in known]
