"""How one parameter of a space gets its value: from a range, a choice, another one, or fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.vocabulary import VOCABULARY
from optuna_lora_rl.vocabulary import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Condition:
    """Holds when every named parameter has one of the listed values."""

    values: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def holds(self, configuration: Mapping[str, Value]) -> bool:
        return all(configuration[name] in allowed for name, allowed in self.values.items())


@dataclass(frozen=True)
class Range:
    """A tuned number, from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def form(self) -> dict[str, Any]:
        """As a YAML file says it; whether it is whole follows from the parameter."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution
        from optuna.distributions import IntDistribution

        if self.whole:
            step = int(self.step or 1)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def middle(self) -> Value:
        """The value in its middle, on its own scale."""
        at = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step is not None:
            at = self.low + round((at - self.low) / self.step) * self.step
        return round(at) if self.whole else at

    def values(self) -> Sequence[Value] | None:
        """All its values, or None for a range of which there is no end of them."""
        if self.whole:
            return range(int(self.low), int(self.high) + 1, int(self.step or 1))
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + i * self.step for i in range(count)]


@dataclass(frozen=True)
class Choice:
    """A tuned choice among listed values."""

    options: tuple[Value, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.options)

    def middle(self) -> Value:
        """The middle of its numbers; the first of what is not ordered."""
        numbers = [value for value in self.options if isinstance(value, int | float)]
        if len(numbers) < len(self.options):
            return self.options[0]
        return sorted(numbers)[(len(numbers) - 1) // 2]

    def values(self) -> Sequence[Value] | None:
        """All its values."""
        return self.options


@dataclass(frozen=True)
class Fixed:
    """A parameter that is not tuned."""

    value: Value


@dataclass(frozen=True)
class Tied:
    """``ratio`` times the value of the parameter ``of``; the ratio may itself be tuned."""

    of: str
    ratio: float | Range


@dataclass(frozen=True)
class Entry:
    """How one parameter gets its value, and when it is asked for at all."""

    name: str
    source: Range | Choice | Fixed | Tied
    when: Condition = Condition()

    @property
    def needs(self) -> set[str]:
        """Names of the parameters that must have a value before this one."""
        tied = {self.source.of} if isinstance(self.source, Tied) else set()
        return tied | set(self.when.values)

    def tuned(self) -> tuple[str, Range | Choice] | None:
        """The name that Optuna sees and its domain, or None where nothing is tuned."""
        if isinstance(self.source, Range | Choice):
            return self.name, self.source
        if isinstance(self.source, Tied) and isinstance(self.source.ratio, Range):
            return f"{self.name}_ratio", self.source.ratio
        return None

    def value(self, drawn: Value | None, configuration: Mapping[str, Value]) -> Value:
        """The parameter's value, given the drawn one (None where nothing is tuned)."""
        if isinstance(self.source, Fixed):
            return self.source.value
        if isinstance(self.source, Tied):
            ratio = self.source.ratio if drawn is None else drawn
            value = float(ratio) * float(configuration[self.source.of])  # type: ignore[arg-type]
            whole = VOCABULARY[self.name].whole
            return max(1, round(value)) if whole else _tidy(value)
        assert drawn is not None
        return drawn


def _tidy(value: float) -> int | float:
    return int(value) if value.is_integer() else value
