"""Who decides that a layer shall have another rank: the loss curve, or the gradient's spectrum.

Deciders see numbers and return ranks; they neither train nor resize. Each remembers what it has
seen, answers once the same verdict came ``patience`` times in a row, and looks afresh after a
change, whose effect the old numbers do not show.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import spectrum

Verdict = Literal["grow", "shrink"]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How far a rank goes at once, and within which bounds.

    Attributes:
        grow: Factor of a rank that grows; by 1 at least.
        shrink: Factor of a rank that shrinks; by 1 at least.
        minimum: The smallest rank.
        maximum: The largest.
        patience: How many times in a row a verdict must come.
    """

    grow: float = 1.5
    shrink: float = 0.8
    minimum: int = 1
    maximum: int = 64
    patience: int = 2

    def __post_init__(self) -> None:
        if self.grow <= 1:
            raise UserError(f"grow is a factor over 1, not {self.grow}")
        if not 0 < self.shrink < 1:
            raise UserError(f"shrink is a factor between 0 and 1, not {self.shrink}")
        if not 1 <= self.minimum <= self.maximum:
            raise UserError(
                f"minimum and maximum are ranks with 1 <= minimum <= maximum, not "
                f"{self.minimum} and {self.maximum}"
            )
        if self.patience < 1:
            raise UserError(f"patience is at least 1, not {self.patience}")

    def taken(self, rank: int, verdict: Verdict) -> int:
        """Returns the rank after one step; the same where a bound is in the way."""
        if verdict == "grow":
            return max(rank, min(math.ceil(rank * self.grow - 1e-9), self.maximum))
        return min(rank, max(min(math.floor(rank * self.shrink + 1e-9), rank - 1), self.minimum))


@dataclass(frozen=True)
class Limit:
    """What all layers together may have.

    Attributes:
        budget: Of their ranks' costs, the largest sum.
        costs: What one rank costs, by layer.
    """

    budget: float
    costs: Mapping[str, int]

    def room(self, ranks: Mapping[str, int]) -> float:
        """Returns what is left of the budget, or is missing."""
        return self.budget - sum(self.costs[name] * rank for name, rank in ranks.items())


class LossCurve:
    """Judges all layers together by the course of the loss.

    Over a window, a line through the losses gives their fall, relative to their mean, and their
    scatter about it. A loss that hardly moves and hardly scatters has reached a plateau: the
    adapter may be too small, and grows. One that scatters and keeps changing direction
    oscillates: the adapter shrinks.

    Args:
        window: How many losses are looked at; at least 3.
        plateau: The fall over the window under which the loss stands still.
        calm: The scatter under which a standing loss is a plateau.
        oscillation: The scatter from which a loss oscillates.
        steps: How far ranks go.
        limit: What the layers together do not grow beyond.

    Attributes:
        reasons: Why the last update changed what it changed, by layer.
    """

    def __init__(
        self,
        *,
        window: int = 5,
        plateau: float = 0.01,
        calm: float = 0.01,
        oscillation: float = 0.05,
        steps: Steps | None = None,
        limit: Limit | None = None,
    ) -> None:
        if window < 3:
            raise UserError(f"window is at least 3 losses, not {window}")
        if not (plateau > 0 and 0 < calm <= oscillation):
            raise UserError("plateau, calm and oscillation are over 0, and calm <= oscillation")
        self.reasons: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=window)
        self._plateau = plateau
        self._calm = calm
        self._oscillation = oscillation
        self._steps = steps or Steps()
        self._limit = limit
        self._streak = _Streak()

    def update(self, loss: float, ranks: Mapping[str, int]) -> dict[str, int]:
        """Takes the next loss and returns the layers' new ranks, of those that change."""
        self.reasons = {}
        if not math.isfinite(loss):
            return {}
        self._losses.append(loss)
        if len(self._losses) < (self._losses.maxlen or 0):
            return {}
        verdict, reason = self._verdict()
        if self._streak.add(verdict) < self._steps.patience or verdict is None:
            return {}
        new = {name: self._steps.taken(rank, verdict) for name, rank in ranks.items()}
        while verdict == "grow" and self._limit and self._limit.room({**ranks, **new}) < 0:
            if new == ranks:
                return {}
            new = {name: max(ranks[name], rank - 1) for name, rank in new.items()}
        new = {name: rank for name, rank in new.items() if rank != ranks[name]}
        if new:
            self._losses.clear()
            self._streak = _Streak()
        self.reasons = dict.fromkeys(new, reason)
        return new

    def _verdict(self) -> tuple[Verdict | None, str]:
        losses = np.array(self._losses)
        x = np.arange(len(losses))
        slope, start = np.polyfit(x, losses, 1)
        size = max(abs(float(losses.mean())), 1e-12)
        fall = -float(slope) * (len(losses) - 1) / size
        scatter = float(np.std(losses - slope * x - start)) / size
        turns = int((np.diff(np.sign(np.diff(losses))) != 0).sum())
        if abs(fall) < self._plateau and scatter < self._calm:
            return "grow", f"the loss stands still: it fell by {fall:.2%}, scatter {scatter:.2%}"
        if scatter >= self._oscillation and turns >= (len(losses) - 2) / 2:
            return "shrink", f"the loss oscillates: scatter {scatter:.2%}, {turns} turns"
        return None, ""


class GradientSpectrum:
    """Judges each layer by the gradient of its weight.

    A layer grows while its gradient needs more directions than the layer has (the rank for 95% of
    its energy), keeps its direction (the mean cosine between successive gradients), so that it is
    more than noise, and does not fade (the trend of its norm). It shrinks when the gradient needs
    far fewer directions than the layer has.

    Args:
        energy: Share of the gradient's energy.
        consistent: Cosine from which a gradient keeps its direction.
        fading: Fall of the norm, per gradient, from which it fades.
        slack: Share of the rank; a gradient that needs no more shrinks the layer.
        window: How many gradients are looked at; at least 2.
        steps: How far ranks go. A growing rank does not pass what the gradient needs, and a
            shrinking one does not fall below it.
        limit: What the layers together do not grow beyond; those with the most energy in their
            last gradient grow first, and as far as there is room.

    Attributes:
        reasons: Why the last update changed what it changed, by layer.
    """

    def __init__(
        self,
        *,
        energy: float = 0.95,
        consistent: float = 0.1,
        fading: float = 0.2,
        slack: float = 0.5,
        window: int = 3,
        steps: Steps | None = None,
        limit: Limit | None = None,
    ) -> None:
        if not 0 < energy < 1:
            raise UserError(f"energy is a share between 0 and 1, not {energy}")
        if not 0 < slack < 1:
            raise UserError(f"slack is a share between 0 and 1, not {slack}")
        if window < 2:
            raise UserError(f"window is at least 2 gradients, not {window}")
        self.reasons: dict[str, str] = {}
        self._energy = energy
        self._consistent = consistent
        self._fading = fading
        self._slack = slack
        self._window = window
        self._steps = steps or Steps()
        self._limit = limit
        self._seen: dict[str, _Gradients] = {}

    def update(self, gradients: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
        """Takes the next gradients and returns the layers' new ranks, of those that change.

        Args:
            gradients: The gradient of each weight or a sketch of it (:mod:`.probe`), always of
                the same shape; layers may be left out.
            ranks: The layers' ranks.
        """
        self.reasons = {}
        new = {}
        for name, gradient in gradients.items():
            seen = self._seen.setdefault(name, _Gradients(self._window))
            seen.add(gradient, self._energy)
            if not seen.full:
                continue
            verdict, reason = self._verdict(seen, ranks[name])
            if seen.streak.add(verdict) < self._steps.patience or verdict is None:
                continue
            rank = self._steps.taken(ranks[name], verdict)
            bound = min(rank, seen.needed) if verdict == "grow" else max(rank, seen.needed)
            if bound != ranks[name]:
                new[name] = bound
                self.reasons[name] = reason
        new = self._within(new, ranks)
        self.reasons = {name: self.reasons[name] for name in new}
        for name in new:
            del self._seen[name]
        return new

    def _within(self, wanted: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
        """Returns of the wanted ranks what there is room for."""
        limit = self._limit
        if limit is None:
            return dict(wanted)
        new = {name: rank for name, rank in wanted.items() if rank < ranks[name]}
        room = limit.room({**ranks, **new})
        growing = [name for name in wanted if name not in new]
        for name in sorted(growing, key=lambda name: -self._seen[name].energy):
            more = min(wanted[name] - ranks[name], int(max(room, 0) // limit.costs[name]))
            if more:
                new[name] = ranks[name] + more
                room -= more * limit.costs[name]
        return new

    def _verdict(self, seen: _Gradients, rank: int) -> tuple[Verdict | None, str]:
        needed, cosine, trend = seen.needed, seen.consistency, seen.trend
        reason = (
            f"{self._energy:.0%} of the gradient's energy takes {needed} directions, "
            f"cosine {cosine:.2f}, norm {trend:+.0%} each time"
        )
        if needed > rank and cosine >= self._consistent and trend > -self._fading:
            return "grow", reason
        if 0 < needed <= self._slack * rank:
            return "shrink", reason
        return None, reason


class _Gradients:
    """What is remembered of one layer's gradients."""

    def __init__(self, window: int) -> None:
        self.streak = _Streak()
        self.needed = 0
        self._norms: deque[float] = deque(maxlen=window)
        self._cosines: deque[float] = deque(maxlen=window - 1)
        self._last: Tensor | None = None

    def add(self, gradient: Tensor, energy: float) -> None:
        gradient = gradient.detach().float()
        found = spectrum.of_matrix(gradient)
        self.needed = found.energy_rank(energy)
        if self._last is not None:
            product = float((gradient * self._last).sum())
            scale = found.frobenius_norm * self._norms[-1]
            self._cosines.append(product / scale if scale else 0.0)
        self._norms.append(found.frobenius_norm)
        self._last = gradient.clone()

    @property
    def energy(self) -> float:
        """Of the last gradient."""
        return self._norms[-1] ** 2

    @property
    def full(self) -> bool:
        return len(self._norms) == self._norms.maxlen

    @property
    def consistency(self) -> float:
        return float(np.mean(self._cosines))

    @property
    def trend(self) -> float:
        """Relative change of the norm from one gradient to the next, as a mean."""
        first, last = self._norms[0], self._norms[-1]
        if not (first and last):
            return 0.0
        return float((last / first) ** (1 / (len(self._norms) - 1)) - 1)


class _Streak:
    """Counts how often the same verdict came in a row."""

    def __init__(self) -> None:
        self._verdict: Verdict | None = None
        self._count = 0

    def add(self, verdict: Verdict | None) -> int:
        self._count = self._count + 1 if verdict == self._verdict else 1
        self._verdict = verdict
        return self._count
