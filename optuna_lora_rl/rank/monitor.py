"""What becomes of each layer while an adapter is trained, and what that suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any
from typing import Literal

import numpy as np
from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers

Concern = Literal[
    "large gradient", "small gradient", "converged", "unstable", "too many parameters"
]


@dataclass(frozen=True)
class Reading:
    """One layer at one step.

    Attributes:
        step: Optimizer steps taken.
        rank: Its rank.
        parameters: Parameters of its factors.
        dense: Parameters of its weight.
        weight_norm: Frobenius norm of the update s B A.
        gradient_norm: Norm of the factors' gradients; NaN where there are none.
    """

    step: int
    rank: int
    parameters: int
    dense: int
    weight_norm: float
    gradient_norm: float


@dataclass(frozen=True)
class Suggestion:
    """What a layer's readings suggest.

    Attributes:
        layer: The layer.
        concern: What is the matter.
        text: A sentence with the numbers, and what to do.
    """

    layer: str
    concern: Concern
    text: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on a layer is of concern.

    Attributes:
        large: Gradient norm over the median of the layers.
        small: Median over the gradient norm.
        settled: Relative change of the update's norm over the window, under which with a gradient
            that has fallen to ``faded`` of its largest a layer has converged.
        faded: See ``settled``.
        unstable: Standard deviation of the gradient norm over its mean, within the window.
        parameters: Adapter parameters over those of the weight.
        window: How many of the last readings are looked at.
    """

    large: float = 3.0
    small: float = 10.0
    settled: float = 0.01
    faded: float = 0.1
    unstable: float = 1.0
    parameters: float = 0.5
    window: int = 5

    def __post_init__(self) -> None:
        if self.large <= 1 or self.small <= 1:
            raise UserError(
                f"large and small are factors over 1, not {self.large} and {self.small}"
            )
        if self.window < 2:
            raise UserError(f"window is at least 2 readings, not {self.window}")


class Monitor:
    """Gathers readings.

    Args:
        limits: From where on a layer is of concern.

    Attributes:
        history: The readings of each layer, oldest first.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.history: dict[str, list[Reading]] = {}
        self._limits = limits or Limits()

    def record(self, readings: Mapping[str, Reading]) -> None:
        """Takes one reading of each layer."""
        for name, reading in readings.items():
            self.history.setdefault(name, []).append(reading)

    def table(self) -> list[dict[str, str | float | int]]:
        """Returns a row a layer: the last reading, and trends per reading within the window."""
        rows: list[dict[str, str | float | int]] = []
        for name, readings in self.history.items():
            last, recent = readings[-1], readings[-self._limits.window :]
            rows.append(
                {
                    "layer": name,
                    "rank": last.rank,
                    "parameters": last.parameters,
                    "weight_norm": last.weight_norm,
                    "weight_trend": trend([one.weight_norm for one in recent]),
                    "gradient_norm": last.gradient_norm,
                    "gradient_trend": trend([one.gradient_norm for one in recent]),
                }
            )
        return rows

    def course(self) -> list[dict[str, float]]:
        """Returns a row a reading: medians over the layers, and all their parameters."""
        rows = []
        for readings in zip(*self.history.values(), strict=True):
            gradients = [one.gradient_norm for one in readings if math.isfinite(one.gradient_norm)]
            rows.append(
                {
                    "step": readings[0].step,
                    "weight_norm": float(np.median([one.weight_norm for one in readings])),
                    "gradient_norm": float(np.median(gradients)) if gradients else math.nan,
                    "parameters": sum(one.parameters for one in readings),
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """Returns course, table and suggestions as JSON values, of four digits."""
        return {
            "course": [_rounded(row) for row in self.course()],
            "layers": [_rounded(row) for row in self.table()],
            "suggestions": [asdict(one) for one in self.suggestions()],
        }

    def suggestions(self) -> list[Suggestion]:
        """Returns what the readings so far suggest, layer by layer."""
        norms = [readings[-1].gradient_norm for readings in self.history.values()]
        known = [norm for norm in norms if math.isfinite(norm)]
        median = float(np.median(known)) if known else math.nan
        found = []
        for name, readings in self.history.items():
            for concern, text in (
                *self._against_others(readings[-1], median),
                *self._over_time(readings),
                *self._in_size(readings[-1]),
            ):
                found.append(Suggestion(name, concern, text))
        return found

    def _against_others(self, last: Reading, median: float) -> list[tuple[Concern, str]]:
        if not (median > 0 and math.isfinite(last.gradient_norm)):
            return []
        ratio = last.gradient_norm / median
        if ratio > self._limits.large:
            return [
                (
                    "large gradient",
                    f"the gradient norm is {ratio:.1f} times the median of the layers; a larger "
                    "rank may serve this layer, or a smaller learning rate all",
                )
            ]
        if ratio < 1 / self._limits.small:
            return [
                (
                    "small gradient",
                    f"the gradient norm is {ratio:.3f} of the median of the layers; a smaller "
                    "rank may do",
                )
            ]
        return []

    def _over_time(self, readings: Sequence[Reading]) -> list[tuple[Concern, str]]:
        recent = readings[-self._limits.window :]
        gradients = [one.gradient_norm for one in recent]
        if not all(math.isfinite(norm) for norm in gradients[-1:]):
            return [("unstable", "the gradient is no finite number; take a smaller learning rate")]
        if len(recent) < self._limits.window or not all(map(math.isfinite, gradients)):
            return []
        mean = float(np.mean(gradients))
        scatter = float(np.std(gradients)) / mean if mean else 0.0
        if scatter > self._limits.unstable:
            return [
                (
                    "unstable",
                    f"the gradient norm scatters by {scatter:.1f} times its mean; take a smaller "
                    "learning rate or a larger batch",
                )
            ]
        weights = [one.weight_norm for one in recent]
        change = (max(weights) - min(weights)) / max(*weights, 1e-300)
        largest = max(one.gradient_norm for one in readings if math.isfinite(one.gradient_norm))
        if (
            weights[-1] > 0
            and change < self._limits.settled
            and (mean <= self._limits.faded * largest)
        ):
            return [
                (
                    "converged",
                    f"the update changed by {change:.2%} over {len(recent)} readings, and the "
                    f"gradient fell to {mean / largest:.1%} of its largest: it learns no more",
                )
            ]
        return []

    def _in_size(self, last: Reading) -> list[tuple[Concern, str]]:
        share = last.parameters / last.dense
        if share <= self._limits.parameters:
            return []
        return [
            (
                "too many parameters",
                f"rank {last.rank} takes {share:.0%} of the parameters of the weight itself; take "
                "a smaller rank",
            )
        ]


def read(model: nn.Module, step: int, adapter: str = "default") -> dict[str, Reading]:
    """Reads all layers of an attached adapter; gradients as they stand.

    Raises:
        UserError: When the model has no such adapter.
    """
    found = {}
    for name, layer in layers.lora_layers(model, adapter).items():
        factors = layers.factors_of(layer, adapter)
        gradients = [layer.lora_A[adapter].weight.grad, layer.lora_B[adapter].weight.grad]
        found[name] = Reading(
            step=step,
            rank=factors.rank,
            parameters=factors.parameters,
            dense=factors.shape[0] * factors.shape[1],
            weight_norm=_norm(factors),
            gradient_norm=_joint_norm(gradients),
        )
    return found


def trend(values: Sequence[float]) -> float:
    """Returns the mean relative change from one value to the next; 0 where there is none."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if len(known) < 2:
        return 0.0
    slope = np.polyfit(np.arange(len(known)), np.log(known), 1)[0]
    return float(np.expm1(slope))


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def _norm(factors: layers.Factors) -> float:
    # ||B A||^2 = tr((B^T B) (A A^T)), of matrices r x r.
    a, b = factors.a.double(), factors.b.double()
    energy = float(((b.T @ b) * (a @ a.T)).sum())
    return abs(factors.scaling) * math.sqrt(max(energy, 0.0))


def _joint_norm(gradients: Sequence[Tensor | None]) -> float:
    known = [gradient for gradient in gradients if gradient is not None]
    if not known:
        return math.nan
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in known))
