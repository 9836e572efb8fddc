"""Search spaces as tensors: what candidates and features need to know of them, batched.

Notations
    B     spaces in the batch, D their largest number of dimensions, R = number of roles
    G     nodes of the tables along a dimension (``prior.NODES``)
    x     points in the unit cube, shape (B, N, D); padded columns are 0.5
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.prior import log_lengthscale
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.surrogate import Lengthscales

MAX_TABLE_LEVELS = 64
_RATE, _RANK, _ALPHA = (ROLES.index(role) for role in ("learning_rate", "rank", "alpha"))
# The roles whose natural values, all in octaves, turn axes of the surrogate's coordinates.
TURNING = (_RANK, _ALPHA, ROLES.index("alpha_ratio"))
_DECADES = math.log10(2.0)


@dataclass
class Layout:
    """A batch of spaces.

    Args:
        real: which columns are dimensions and which padding, shape (B, D).
        unordered: columns without order, shape (B, D).
        levels: unit coordinates of the values of discrete columns, shape (B, D, 64), padded with
            2; continuous columns (and those of more levels) have none.
        role_column: column of each role, shape (B, R); -1 where the space lacks it.
        natural: natural values of the roles at the nodes, shape (B, R, G); 0 where absent.
        log_density: prior log-density at the nodes by column, shape (B, D, G).
        default: the guides' configuration, shape (B, D).
        sweep: an expert's learning-rate sweep at three sizes of a run, shape (B, SWEEP, D).
        is_lora: whether the guides' prior applies, shape (B,).
        log_l: mean and deviation of the log lengthscales, shape (B, D, 2).
    """

    real: Tensor
    unordered: Tensor
    levels: Tensor
    role_column: Tensor
    natural: Tensor
    log_density: Tensor
    default: Tensor
    sweep: Tensor
    is_lora: Tensor
    log_l: Tensor

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, rows: Tensor | slice) -> Layout:
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def has_role(self) -> Tensor:
        """Shape (B, R)."""
        return self.role_column >= 0

    def lengthscales(self) -> Lengthscales:
        """The surrogate's prior."""
        return Lengthscales(self.log_l[:, :, 0], self.log_l[:, :, 1])

    def snap(self, x: Tensor) -> Tensor:
        """Points moved onto configurations that exist."""
        x = x.clamp(0.0, 1.0)
        for column in torch.nonzero((self.levels[:, :, 0] <= 1.0).any(0)).flatten().tolist():
            levels = self.levels[:, column]
            u = x[:, :, column]
            nearest = (u[:, :, None] - levels[:, None, :]).abs().argmin(-1)
            snapped = levels.gather(1, nearest)
            x[:, :, column] = torch.where(levels[:, :1] <= 1.0, snapped, u)
        return x

    def role_values(self, x: Tensor) -> Tensor:
        """Natural values of the roles at x, shape (B, N, R); 0 where a role is absent."""
        column = self.role_column.clamp_min(0)
        u = x.gather(2, column[:, None, :].expand(-1, x.shape[1], -1))
        return interpolate(self.natural, u) * self.has_role[:, None, :]

    def log_prior(self, x: Tensor) -> Tensor:
        """Prior log-density at x, shape (B, N); alpha is judged relative to the rank."""
        by_column = interpolate(self.log_density, x) * self.real[:, None, :]
        total = by_column.sum(-1)
        rank, alpha = ROLES.index("rank"), ROLES.index("alpha")
        both = self.has_role[:, rank] & self.has_role[:, alpha] & self.is_lora
        if bool(both.any()):
            own = by_column.gather(
                2, self.role_column[:, alpha].clamp_min(0)[:, None, None].expand(-1, x.shape[1], 1)
            )[:, :, 0]
            values = self.role_values(x)
            z = (values[:, :, alpha] - values[:, :, rank] - GUIDE_RATIO) / GUIDE_RATIO_SPREAD
            # A heavy tail: a wrong ratio is unlikely, not excluded.
            relative = -torch.log1p(0.5 * z * z) * 1.5
            total = total + torch.where(both[:, None], relative - own, torch.zeros_like(own))
        return total

    def model_coordinates(self, x: Tensor) -> Tensor:
        """What the surrogate works in: x with the axes of alpha and the learning rate turned.

        The ridge of a LoRA surface runs along learning rate x alpha / rank: alpha's own axis is
        turned to alpha / rank, in units of alpha's range, and the learning rate's to learning
        rate x root of alpha, in units of its own range. The power was chosen on measured tasks of
        the training families.
        """
        kept, turn = self.turn()
        if not bool(turn.any()):
            return x
        columns = self._turning[:, None].expand(-1, x.shape[1], -1)
        natural = interpolate(self.natural[:, TURNING], x.gather(2, columns))
        return x * kept[:, None] + natural @ turn.mT

    def turn(self) -> tuple[Tensor, Tensor]:
        """How the model's coordinates z = kept x + turn v follow from x and natural values v.

        Returns:
            ``kept``, shape (B, D), and ``turn``, shape (B, D, 3), with v of the roles ``TURNING``.
        """
        kept = torch.ones(self.real.shape, dtype=torch.float64)
        turn = torch.zeros((*kept.shape, len(TURNING)), dtype=torch.float64)
        span = (self.natural[:, :, -1] - self.natural[:, :, 0]).clamp_min(1e-3)
        rank, alpha, ratio, rate = (self.has_role[:, r] for r in (*TURNING, _RATE))
        rows, column = self._where(rank & alpha, _ALPHA)
        kept[rows, column] = 0.0
        turn[rows, column, 0] = -1 / span[rows, _ALPHA]
        turn[rows, column, 1] = 1 / span[rows, _ALPHA]
        rows, column = self._where(self.is_lora & rate & (alpha | ratio), _RATE)
        root = 0.5 * _DECADES / span[rows, _RATE]
        turn[rows, column, 0] = root * (rank & ~alpha)[rows]
        turn[rows, column, 1] = root * alpha[rows]
        turn[rows, column, 2] = root * (~alpha)[rows]
        return kept, turn

    def _where(self, wanted: Tensor, role: int) -> tuple[Tensor, Tensor]:
        """The wanted spaces (B,) and their column of a role."""
        rows = torch.nonzero(wanted)[:, 0]
        return rows, self.role_column[rows, role]

    @property
    def _turning(self) -> Tensor:
        """Columns of the roles ``TURNING``, shape (B, 3); 0 where there is none."""
        return self.role_column[:, TURNING].clamp_min(0)

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """A gradient by the model's coordinates, shape (B, N, D), as one by x."""
        kept, turn = self.turn()
        if not bool(turn.any()):
            return gradient
        columns = self._turning[:, None].expand(-1, x.shape[1], -1)
        rise = _slopes(self.natural[:, TURNING], x.gather(2, columns))
        return (gradient * kept[:, None]).scatter_add(2, columns, gradient @ turn * rise)


def _slopes(table: Tensor, u: Tensor) -> Tensor:
    """Slopes of tables (B, C, G) at u (B, N, C), shape kept."""
    G = table.shape[-1]
    left = (u.clamp(0.0, 1.0) * (G - 1)).long().clamp_max(G - 2).transpose(1, 2)
    return ((table.gather(2, left + 1) - table.gather(2, left)) * (G - 1)).transpose(1, 2)


def interpolate(table: Tensor, u: Tensor) -> Tensor:
    """Linear interpolation of tables (B, C, G) at u (B, N, C), shape (B, N, C)."""
    G = table.shape[-1]
    position = (u.clamp(0.0, 1.0) * (G - 1)).transpose(1, 2)
    left = position.floor().long().clamp_max(G - 2)
    low, high = table.gather(2, left), table.gather(2, left + 1)
    return (low + (high - low) * (position - left)).transpose(1, 2)


def layout_of(space: Space) -> Layout:
    """The layout of one space, as a batch of one."""
    d, R = len(space), len(ROLES)
    prior = space_prior(space)
    levels = np.full((d, MAX_TABLE_LEVELS), 2.0)
    role_column, natural = np.full(R, -1), np.zeros((R, NODES))
    for column, dimension in enumerate(space.dimensions):
        if dimension.n_levels is not None and dimension.n_levels <= MAX_TABLE_LEVELS:
            grid = dimension.grid(MAX_TABLE_LEVELS)
            levels[column, : len(grid)] = grid
    for role, column in space.role_columns.items():
        role_column[ROLES.index(role)] = column
        natural[ROLES.index(role)] = prior.natural[column]
    log_l = np.array([log_lengthscale(dimension, d) for dimension in space.dimensions])

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))[None]

    return Layout(
        real=torch.ones((1, d), dtype=torch.bool),
        unordered=tensor(space.is_categorical),
        levels=tensor(levels),
        role_column=tensor(role_column),
        natural=tensor(natural),
        log_density=tensor(prior.log_density),
        default=tensor(prior.point()),
        sweep=tensor(prior.sweep()),
        is_lora=torch.tensor([prior.is_lora]),
        log_l=tensor(log_l.reshape(d, 2)),
    )


def stack(layouts: Sequence[Layout], width: int = 0) -> Layout:
    """Several layouts in one batch, padded to the most dimensions, at least ``width``."""
    D = max(width, *(layout.real.shape[1] for layout in layouts))
    padding = {"real": 0.0, "unordered": 0.0, "levels": 2.0, "log_density": 0.0, "log_l": 0.0}
    padding |= {"default": 0.5, "sweep": 0.5}

    def pad(name: str) -> Tensor:
        tensors = [getattr(layout, name) for layout in layouts]
        if name in padding:
            axis = 2 if name == "sweep" else 1
            tensors = [_widen(t, axis, D, padding[name]) for t in tensors]
        return torch.cat(tensors)

    stacked = Layout(**{f.name: pad(f.name) for f in fields(Layout)})
    # Padded columns stand at 0.5 for every point, so any lengthscale will do.
    stacked.log_l[:, :, 1] = torch.where(stacked.real, stacked.log_l[:, :, 1], 1.0)
    return stacked


def _widen(tensor: Tensor, axis: int, size: int, value: float) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, torch.full(shape, value, dtype=tensor.dtype)], axis)


Snap = Callable[[Tensor], Tensor]


def exact_snap(space: Space) -> Snap:
    """Snapping by the space itself: exact also for long or uneven discrete dimensions."""

    def snap(x: Tensor) -> Tensor:
        return torch.from_numpy(space.snap(x.numpy()))

    return snap
