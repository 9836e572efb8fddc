"""What is tabulated of one space; the twin of :mod:`~optuna_lora_rl.policy.layout`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.layout import TURNING
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.prior import NODES
from optuna_lora_rl.policy.roles import ROLES

_RANK, _ALPHA = ROLES.index("rank"), ROLES.index("alpha")


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
        coordinates: the surrogate's, shape (N, D); see ``Layout.model_coordinates``.
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


class Tables:
    """A space as arrays.

    Args:
        layout: a batch of one space, without padding.

    Attributes:
        layout: the same.
        default: the guides' configuration, shape (D,).
        sweep: an expert's learning-rate sweep at three sizes of a run, shape (SWEEP, D).
        unordered: columns without order, shape (D,).
        is_lora: whether the guides' prior applies.
        column: of each role, by its number; -1 where the space lacks it.
        log_l: mean and deviation of the log lengthscales, shape (D, 2).
        natural: natural values of the roles at the nodes, shape (R, G).
        log_density: prior log-density at the nodes by column, shape (D, G).
        alpha: column of alpha; -1 without.
        turns: whether there are rank and alpha, so that alpha is judged by their ratio.
        present: numbers of the roles that the space has.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.default = layout.default[0].numpy()
        self.sweep = layout.sweep[0].numpy()
        self.unordered = layout.unordered[0].numpy()
        self.is_lora = bool(layout.is_lora[0])
        self.column: list[int] = layout.role_column[0].tolist()
        self.log_l = layout.log_l[0].numpy()
        self.natural = layout.natural[0].numpy()
        self.log_density: np.ndarray = layout.log_density[0].numpy()
        self._log_density = Table(self.log_density)
        self._rank, self.alpha = self.column[_RANK], self.column[_ALPHA]
        self.turns = min(self._rank, self.alpha) >= 0
        self.present = np.array([r for r, c in enumerate(self.column) if c >= 0], dtype=np.intp)
        self._columns = np.array([self.column[r] for r in self.present], dtype=np.intp)
        self._roles = Table(self.natural[self.present])
        self._ranks = Table(self.natural[[_RANK]])
        kept, turn = (tensor[0].numpy() for tensor in layout.turn())
        used = np.flatnonzero(turn.any(0)).tolist()
        self._turning = np.array([self.column[TURNING[i]] for i in used], dtype=np.intp)
        self._kept, self._turn = kept, np.ascontiguousarray(turn[:, used].T)
        self._turned = Table(self.natural[[TURNING[i] for i in used]])
        self._by_roles = np.array([TURNING[i] for i in used], dtype=np.intp)

    def __len__(self) -> int:
        return len(self.default)

    @cached_property
    def prior_cells(self) -> Tensor:
        """The prior's cumulative share of each cell between nodes, shape (D, G - 1)."""
        density = self.layout.log_density[0].exp()
        cells = 0.5 * (density[:, 1:] + density[:, :-1])
        return (cells.cumsum(-1) / cells.sum(-1, keepdim=True)).contiguous()

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


def rand(*shape: int, generator: torch.Generator) -> np.ndarray:
    """Uniform random numbers."""
    drawn: np.ndarray = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
    return drawn


def randn(*shape: int, generator: torch.Generator) -> np.ndarray:
    """Normal random numbers."""
    drawn: np.ndarray = torch.randn(shape, generator=generator, dtype=torch.float64).numpy()
    return drawn
