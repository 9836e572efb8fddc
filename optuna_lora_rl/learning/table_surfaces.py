"""The measured tables' fitted surfaces in the form that tasks are cut out of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl import tiny
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna_lora_rl.learning.tables.surfaces import Surfaces

# Deviation between seeds, in quality, where a table has no repeats.
_USUAL_NOISE = 0.01
# Configurations and cross-validated rank correlation below which a surface is left out.
_FEWEST, _RANKED = 30, 0.5


def _dimension(name: str) -> Dimension:
    one = design.SPACE[name]
    if isinstance(one, design.Level) and isinstance(one.values[0], str):
        return Dimension(name, "categorical", choices=one.values)
    low, high = coordinates.bounds(name)
    kind = "int" if isinstance(one, design.Level) else "float"
    return Dimension(name, kind, low, high, log=name in coordinates.LOGARITHMIC)


DIMENSIONS = make_space([_dimension(name) for name in coordinates.NAMES]).dimensions


class TableSurface:
    """One table's surface as a ``ResponseSurface``: quality, cost, and where runs diverge.

    Args:
        one: the surfaces of a single table.
    """

    dimensions = DIMENSIONS

    def __init__(self, one: Surfaces) -> None:
        (self.name,) = one.names
        self.context = _context(self.name.split("/")[0])
        self.noise = float(one.noise[0]) or _USUAL_NOISE
        self._surfaces = one

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Final quality and divergence at natural values x (N, P), each of shape (N,)."""
        u = _coordinates(x)
        quality = self._surfaces.quality(u)[0].numpy()
        diverges = self._surfaces.divergence(u)[0, :, 0].numpy() > 0
        return quality, diverges | (quality < surfaces.DIVERGED)

    def cost(self, x: np.ndarray) -> np.ndarray:
        """Counted cost relative to the default configuration at natural values x, shape (N,)."""
        return self._surfaces.cost(_coordinates(x))[0].numpy()


@cache
def _context(model: str) -> TuningContext:
    return TuningContext(hidden_size=TuningContext.of(tiny.MODELS[model]).hidden_size)


def _coordinates(x: np.ndarray) -> Tensor:
    columns = [_coordinate(dimension, x[:, j]) for j, dimension in enumerate(DIMENSIONS)]
    return torch.from_numpy(np.stack(columns, 1))[None]


def _coordinate(dimension: Dimension, x: np.ndarray) -> np.ndarray:
    if not dimension.is_ordered:
        return x
    low, high = dimension.low, dimension.high
    if dimension.log:
        return np.log(x / low) / math.log(high / low)
    return (x - low) / (high - low)


def load(split: str) -> list[TableSurface]:
    """The surfaces of a split of the tables that predict runs they were not fitted to."""
    if not dataset.FILE.is_file():
        return []
    facts = json.loads(surfaces.FITS.read_text(encoding="utf-8"))
    loaded = surfaces.load(split)
    good = [row for row, name in enumerate(loaded.names) if is_good(facts[name]["facts"])]
    return [TableSurface(_last(loaded[[row]])) for row in good]


def is_good(facts: Mapping[str, float | None]) -> bool:
    """Whether cross-validation found a surface to rank configurations fairly."""
    return (facts["configurations"] or 0) >= _FEWEST and (facts["spearman"] or 0.0) >= _RANKED


def _last(one: Surfaces) -> Surfaces:
    """Without the earlier points of the learning curve, which nobody asks for here."""
    curve = one.curve
    outputs = {name: getattr(curve, name)[:, -1:] for name in ("alpha", "shift", "stretch")}
    return replace(one, curve=replace(curve, **outputs))
