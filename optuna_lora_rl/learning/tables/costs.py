"""What a run of a table costs, exactly: counted by the fine-tuner beforehand.

Notations
    T        tables
    r, S, b  rank, steps, batch size

For given targets, layers, batch size and for dropout or none the counted cost is bilinear in rank
and steps: ``c_0 + c_1 r + S (c_2 + c_3 r)``, so four counts determine it. Between two measured
batch sizes it is interpolated along b.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch

from optuna_lora_rl.learning.tables import coordinates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FILE = Path(__file__).resolve().parent / "costs.safetensors"
_COLUMN = {name: column for column, name in enumerate(coordinates.NAMES)}


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of T tables.

    Attributes:
        c: Coefficients by targets, layers, batch size and dropout (no, yes), each in the order
            of ``design.SPACE``, shape (T, 4, 4, 4, 2, 4).
    """

    c: Tensor

    def __getitem__(self, rows: Any) -> Costs:
        return Costs(self.c[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the relative cost at coordinates x (T, N, D), shape (T, N)."""

        def column(name: str) -> Tensor:
            return x[:, :, _COLUMN[name]]

        most = self.c.shape[3] - 1
        place = column("batch_size").clamp(0.0, 1.0) * most
        left = place.floor().long().clamp_max(most - 1)
        where = torch.arange(len(x))[:, None], column("target_modules").long()
        c = self.c[*where, column("layers").long()]
        rows, columns = torch.arange(len(x))[:, None], torch.arange(x.shape[1])[None]
        dropped = (column("lora_dropout") > 0).long()
        low, high = (c[rows, columns, batch, dropped] for batch in (left, left + 1))
        # The batch sizes are powers of two: between b and 2 b the way is b' / b - 1.
        at = low + (high - low) * ((place - left).exp2() - 1.0)[:, :, None]
        r, S = (_natural(name, column(name)) for name in ("lora_rank", "max_steps"))
        return at[..., 0] + at[..., 1] * r + S * (at[..., 2] + at[..., 3] * r)


def _natural(name: str, u: Tensor) -> Tensor:
    low, high = coordinates.bounds(name)
    return low * (high / low) ** u


def load(names: Sequence[str], path: Path = FILE) -> Costs:
    """Return the costs of the named tables."""
    from safetensors.torch import load_file

    known = load_file(path)
    return Costs(torch.stack([known[name] for name in names]).double())
