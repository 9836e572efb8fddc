"""A search space as arrays: what candidates and features need to know of it.

Notations
    N, D, R   points, columns, number of roles
    G         nodes of the tables along a dimension (``prior.NODES``)
    x         points in the unit cube, shape (N, D)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.bank import SURFACES
from optuna_lora_rl.policy.bank import Bank
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.prior import log_lengthscale
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.roles import ROLES

_RATE, _RANK, _ALPHA, _RATIO = (
    ROLES.index(role) for role in ("learning_rate", "rank", "alpha", "alpha_ratio")
)
# The roles whose natural values, all in octaves, turn axes of the surrogate's coordinates.
_TURNING = (_RANK, _ALPHA, _RATIO)
_DECADES = math.log10(2.0)


class Places(NamedTuple):
    """Where values lie between the nodes of tables: the left node and the way to the next."""

    left: np.ndarray
    way: np.ndarray


def places(u: np.ndarray) -> Places:
    """The places of unit coordinates, shape kept."""
    position = np.minimum(np.maximum(u, 0.0), 1.0) * (NODES - 1)
    left = np.minimum(position.astype(np.intp), NODES - 2)
    return Places(left, position - left)


class Table:
    """Tables, one for each column, shape (C, G), interpolated linearly.

    Args:
        nodes: the values at the nodes.
    """

    def __init__(self, nodes: np.ndarray) -> None:
        self._low = np.ascontiguousarray(nodes[:, :-1]).ravel()
        self._rise = np.diff(nodes, axis=1).ravel()
        self._start = np.arange(len(nodes)) * (NODES - 1)

    def at(self, place: Places) -> np.ndarray:
        """Values at places (N, C), shape kept."""
        index = place.left + self._start
        return self._low.take(index) + self._rise.take(index) * place.way

    def rise(self, place: Places) -> tuple[np.ndarray, np.ndarray]:
        """Values there, and their slopes by the unit coordinate, shape kept."""
        index = place.left + self._start
        rise = self._rise.take(index)
        return self._low.take(index) + rise * place.way, rise * (NODES - 1)


@dataclass(frozen=True)
class Points:
    """Points with what their space says of them.

    Args:
        x: shape (N, D).
        coordinates: the surrogate's, shape (N, D); see :class:`Layout`.
        roles: natural values of the roles that the space has, by role, shape (N,) each.
        log_prior: log-density of the guides' prior, shape (N,).
    """

    x: np.ndarray
    coordinates: np.ndarray
    roles: np.ndarray
    log_prior: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: np.ndarray) -> Points:
        # Much faster than an index where there are columns.
        columns = (self.x, self.coordinates, self.roles, self.log_prior)
        return Points(*(column.take(rows, 0) for column in columns))

    def with_(self, other: Points) -> Points:
        """These points, then those."""
        return Points(
            np.concatenate([self.x, other.x]),
            np.concatenate([self.coordinates, other.coordinates]),
            np.concatenate([self.roles, other.roles]),
            np.concatenate([self.log_prior, other.log_prior]),
        )


class Layout:
    """A space as arrays.

    The surrogate works in coordinates of its own. The ridge of a LoRA surface runs along learning
    rate x alpha / rank: alpha's own axis is turned to alpha / rank, in units of alpha's range, and
    the learning rate's to learning rate x root of alpha, in units of its own range. The power was
    chosen on measured tasks of the training families.

    Args:
        space: the dimensions.
        context: what is known of model, data and run.
        charged: whether the study knows what a configuration costs, so that scores are told as
            quality.
        surfaces: how many response surfaces the bank draws.

    Attributes:
        context: what is known of model, data and run.
        charged: whether costs are known.
        expected: log10 of the best learning rate that follows from it; ``None`` without a model.
        rows: log10 of the examples that a run is taken to see; ``None`` where nobody says.
        default: the guides' configuration, shape (D,).
        sweep: an expert's learning-rate sweep at three sizes of a run, shape (SWEEP, D).
        unordered: columns without order, shape (D,).
        is_lora: whether the guides' prior applies.
        column: of each role, by its number; -1 where the space lacks it.
        log_l: mean and deviation of the log lengthscales, shape (D, 2).
        natural: natural values of the roles at the nodes, shape (R, G); 0 where absent.
        log_density: prior log-density at the nodes by column, shape (D, G).
        alpha: column of alpha; -1 without.
        turns: whether there are rank and alpha, so that alpha is judged by their ratio.
        present: numbers of the roles that the space has.
    """

    def __init__(
        self,
        space: Space,
        context: TuningContext | None = None,
        *,
        charged: bool = False,
        surfaces: int = SURFACES,
    ) -> None:
        self.charged, self._surfaces = charged, surfaces
        prior = space_prior(space, context)
        self.context, self.expected, self.rows = context, prior.expected, prior.rows
        self.default, self.sweep = prior.point(), prior.sweep()
        self.unordered, self.is_lora = space.is_categorical, prior.is_lora
        self.column = [space.role_columns.get(role, -1) for role in ROLES]
        self.present = np.flatnonzero(np.array(self.column) >= 0)
        self._columns = np.array(self.column, dtype=np.intp)[self.present]
        log_l = [log_lengthscale(dimension, len(space)) for dimension in space.dimensions]
        self.log_l = np.array(log_l).reshape(len(space), 2)
        self.natural = np.zeros((len(ROLES), NODES))
        self.natural[self.present] = prior.natural[self._columns]
        self.log_density = prior.log_density
        self._log_density = Table(self.log_density)
        self._rank, self.alpha = self.column[_RANK], self.column[_ALPHA]
        self.turns = min(self._rank, self.alpha) >= 0
        self._roles = Table(self.natural[self.present])
        self._ranks = Table(self.natural[[_RANK]])
        self._kept, turn = self._axes()
        used = [role for role, row in zip(_TURNING, turn, strict=True) if row.any()]
        self._turn = turn[turn.any(1)]
        self._turning = np.array([self.column[role] for role in used], dtype=np.intp)
        self._turned = Table(self.natural[used])
        self._by_roles = np.array(used, dtype=np.intp)

    def __len__(self) -> int:
        return len(self.default)

    def _axes(self) -> tuple[np.ndarray, np.ndarray]:
        """How the surrogate's coordinates z = kept x + v turn follow from x and natural values v.

        Returns:
            ``kept``, shape (D,), and ``turn``, shape (3, D), with v of the roles ``_TURNING``.
        """
        kept, turn = np.ones(len(self)), np.zeros((len(_TURNING), len(self)))
        span = np.maximum(self.natural[:, -1] - self.natural[:, 0], 1e-3)
        rate, rank, alpha, ratio = (self.column[r] for r in (_RATE, *_TURNING))
        if self.turns:
            kept[alpha] = 0.0
            turn[:2, alpha] = -1 / span[_ALPHA], 1 / span[_ALPHA]
        if self.is_lora and rate >= 0 and (alpha >= 0 or ratio >= 0):
            root = 0.5 * _DECADES / span[_RATE]
            if alpha >= 0:
                turn[1, rate] = root
            else:
                turn[0, rate], turn[2, rate] = root * (rank >= 0), root
        return kept, turn

    @cached_property
    def prior_cells(self) -> Tensor:
        """The prior's cumulative share of each cell between nodes, shape (D, G - 1)."""
        density = torch.from_numpy(self.log_density).exp()
        cells = 0.5 * (density[:, 1:] + density[:, :-1])
        return (cells.cumsum(-1) / cells.sum(-1, keepdim=True)).contiguous()

    @cached_property
    def bank(self) -> Bank:
        """Response surfaces that a study of the space may have."""
        return Bank(self, self._surfaces)

    @cached_property
    def first(self) -> np.ndarray:
        """The guides' configuration at the learning rate that the bank would try first, (D,)."""
        return self.bank.at_best_rate(self.default)

    @cached_property
    def usual(self) -> Points:
        """The guides' configuration."""
        return self.points(self.default[None])

    def points(self, x: np.ndarray) -> Points:
        """Points x (N, D) with their coordinates, roles and prior."""
        place = places(x)
        there = Places(*(part.take(self._columns, 1) for part in place))
        roles = np.zeros((len(x), len(ROLES)))
        roles[:, self.present] = self._roles.at(there)
        by_column = self._log_density.at(place)
        log_prior = by_column.sum(1)
        coordinates = x
        if len(self._turning):
            coordinates = x * self._kept + roles.take(self._by_roles, 1).dot(self._turn)
        if self.turns and self.is_lora:
            z = (roles[:, _ALPHA] - roles[:, _RANK] - GUIDE_RATIO) / GUIDE_RATIO_SPREAD
            log_prior += -np.log1p(0.5 * z * z) * 1.5 - by_column[:, self.alpha]
        return Points(x, coordinates, roles, log_prior)

    def model_coordinates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The surrogate's coordinates of x (N, D), and how the values that turn them rise."""
        if not len(self._turning):
            return x, None
        values, slopes = self._turned.rise(places(x.take(self._turning, 1)))
        return x * self._kept + values.dot(self._turn), slopes

    def pull_back(self, gradient: np.ndarray, slopes: np.ndarray | None) -> np.ndarray:
        """A gradient by the model's coordinates (N, D), changed to one by x."""
        if slopes is None:
            return gradient
        through = gradient.dot(self._turn.T) * slopes
        gradient *= self._kept
        gradient[:, self._turning] += through
        return gradient

    def ranks(self, x: np.ndarray) -> np.ndarray:
        """Natural values of the rank at x (N, D), shape (N,)."""
        return self._ranks.at(places(x[:, [self._rank]]))[:, 0]

    def nearest_alpha(self, wished: np.ndarray) -> np.ndarray:
        """Unit coordinates whose alpha is nearest to the wished natural values, shape kept."""
        table = self.natural[_ALPHA]
        nearest = np.abs(table - wished[:, None]).argmin(1)
        return np.asarray(nearest / (NODES - 1))
