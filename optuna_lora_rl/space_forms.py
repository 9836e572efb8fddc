"""The forms that a space may be written in, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.vocabulary import DEFAULTS
from optuna_lora_rl.vocabulary import TARGET_PRESETS
from optuna_lora_rl.vocabulary import VOCABULARY
from optuna_lora_rl.vocabulary import Value
from optuna_lora_rl.vocabulary import finite_number
from optuna_lora_rl.vocabulary import unknown_parameter

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


def entries_of(parameters: Mapping[str, Any], target_sets: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Reads a whole space.

    Args:
        parameters: See :class:`optuna_lora_rl.LoraSpace`.
        target_sets: Names for lists of modules, beside the presets.

    Returns:
        An entry for every name of the vocabulary, what others need before them.

    Raises:
        UserError: For an unknown parameter, an empty range, or a value that is not allowed.
    """
    given = _spelt_out(parameters)
    for name in given:
        if name not in VOCABULARY:
            raise UserError(unknown_parameter(name))
    forms = _Forms(target_sets)
    entries = {name: forms.parse(name, form) for name, form in given.items()}
    for name, default in DEFAULTS.items():
        entries.setdefault(name, Entry(name, Fixed(default)))
    ordered = _in_order_of_need(entries)
    _check_ties(ordered)
    return ordered


class _Forms:
    """Reads the form of one parameter.

    Args:
        target_sets: Names that ``target_modules`` may have beside the presets.
    """

    def __init__(self, target_sets: Iterable[str]) -> None:
        self._target_names = (*TARGET_PRESETS, *target_sets)

    def parse(self, name: str, form: Any) -> Entry:
        if isinstance(form, Range | Choice | Fixed | Tied):
            return Entry(name, self._parse_object(name, form))
        if isinstance(form, Mapping):
            rest = dict(form)
            when = self._condition(name, rest.pop("when", {}))
            return Entry(name, self._parse_mapping(name, rest), when)
        if isinstance(form, Sequence) and not isinstance(form, str):
            return Entry(name, self._choice(name, form))
        product = [side.strip() for side in str(form).split("*")]
        if len(product) == 2 and "" not in product:
            ratio, of = product if finite_number(product[0]) is not None else reversed(product)
            return Entry(name, self._tied(name, ratio, of))
        return Entry(name, Fixed(self._check(name, form)))

    def _parse_object(
        self, name: str, form: Range | Choice | Fixed | Tied
    ) -> Range | Choice | Fixed | Tied:
        if isinstance(form, Range):
            return self._range(name, form.form())
        if isinstance(form, Choice):
            return self._choice(name, form.options)
        if isinstance(form, Fixed):
            return Fixed(self._check(name, form.value))
        ratio = form.ratio.form() if isinstance(form.ratio, Range) else form.ratio
        return self._tied(name, ratio, form.of)

    def _parse_mapping(self, name: str, form: dict[str, Any]) -> Range | Choice | Fixed | Tied:
        keys = set(form)
        if keys == {"fixed"}:
            return Fixed(self._check(name, form["fixed"]))
        if keys == {"choices"}:
            return self._choice(name, form["choices"])
        if keys == {"ratio", "of"}:
            return self._tied(name, form["ratio"], form["of"])
        if {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
            return self._range(name, form)
        raise UserError(
            f"space.{name}: keys {sorted(map(str, keys))} do not fit together; use low and high "
            "(with log or step), choices, fixed, or ratio and of; each may have a when"
        )

    def _range(self, name: str, form: dict[str, Any]) -> Range:
        term = VOCABULARY[name]
        if isinstance(term.default, str | bool):
            raise UserError(f"space.{name}: a range is for numbers; list the choices instead")
        low, high = term.check(name, form["low"]), term.check(name, form["high"])
        bounds_are_whole = isinstance(low, int) and isinstance(high, int)
        whole = term.whole or (name == "lora_alpha" and bounds_are_whole)
        return _make_range(name, low, high, form.get("log", False), form.get("step"), whole)

    def _choice(self, name: str, options: Any) -> Choice:
        if not isinstance(options, Sequence) or isinstance(options, str) or not options:
            raise UserError(f"space.{name}: choices must be a list with at least one value")
        checked = tuple(self._check(name, option) for option in options)
        if len(set(checked)) < len(checked):
            raise UserError(f"space.{name}: the choices {list(options)} name a value twice")
        return Choice(checked)

    def _tied(self, name: str, ratio: Any, of: Any) -> Tied:
        for side in (name, of):
            if not isinstance(side, str) or side not in VOCABULARY:
                raise UserError(unknown_parameter(side))
            if isinstance(DEFAULTS[side], str | bool):
                raise UserError(f"space.{name}: only numbers can be tied, and {side} is none")
        if isinstance(ratio, Mapping):
            if not {"low", "high"} <= set(ratio) <= {"low", "high", "log", "step"}:
                raise UserError(f"space.{name}.ratio: use low and high, with log or step")
            low, high = (_positive(name, ratio[end]) for end in ("low", "high"))
            return Tied(
                of,
                _make_range(
                    f"{name}.ratio", low, high, ratio.get("log", False), ratio.get("step"), False
                ),
            )
        return Tied(of, _positive(name, ratio))

    def _condition(self, name: str, form: Any) -> Condition:
        if not isinstance(form, Mapping):
            raise UserError(f"space.{name}.when: use a mapping such as {{use_dora: [false]}}")
        values = {}
        for other, allowed in form.items():
            if other not in VOCABULARY:
                raise UserError(unknown_parameter(other))
            listed = allowed if isinstance(allowed, list | tuple) else [allowed]
            values[other] = tuple(self._check(other, value) for value in listed)
        return Condition(values)

    def _check(self, name: str, value: Any) -> Value:
        checked = VOCABULARY[name].check(name, value)
        if name == "target_modules" and checked not in self._target_names:
            raise UserError(
                f"space.target_modules: {value!r} is not known; use one of "
                f"{', '.join(self._target_names)}, or define the name under target_sets"
            )
        return checked


def _spelt_out(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces ``truncate: {energy: ...}`` or ``{rank: ...}`` by the parameter that it means."""
    spelt = dict(parameters)
    if "truncate" not in spelt:
        return spelt
    form = spelt.pop("truncate")
    if not isinstance(form, Mapping) or len(form) != 1 or not set(form) <= {"energy", "rank"}:
        raise UserError(
            f"space.truncate: {form!r} is not allowed; use energy or rank: "
            "{energy: 0.95} or {rank: 8}"
        )
    ((limit, value),) = form.items()
    return {**spelt, f"truncate_{limit}": value}


def _make_range(name: str, low: Any, high: Any, log: Any, step: Any, whole: bool) -> Range:
    if not isinstance(log, bool):
        raise UserError(f"space.{name}.log: {log!r} is not allowed; use true or false")
    if not low < high:
        raise UserError(
            f"space.{name}: the range is empty, low {low:g} is not below high {high:g}"
        )
    if log and low <= 0:
        raise UserError(f"space.{name}: a log range needs low > 0, not {low:g}")
    if step is not None:
        step = _positive(f"{name}.step", step)
        if log:
            raise UserError(f"space.{name}: log and step do not go together; drop one")
        if whole and not step.is_integer():
            raise UserError(f"space.{name}.step: {step:g} is not a whole number")
    return Range(low, high, log, step, whole)


def _positive(name: str, value: Any) -> float:
    number = finite_number(value)
    if number is None or number <= 0:
        raise UserError(f"space.{name}: {value!r} is not allowed; use a number above 0")
    return float(number)


def modules_of(name: str, modules: Any) -> tuple[str, ...]:
    """Returns the module-name suffixes of a set of the user's own, checked."""
    listed = isinstance(modules, Sequence) and not isinstance(modules, str)
    if name in TARGET_PRESETS:
        raise UserError(f"target_sets.{name}: the name is taken by a preset; choose another")
    if not listed or not modules or not all(isinstance(m, str) and m for m in modules):
        raise UserError(f"target_sets.{name}: {modules!r} is not allowed; use a list of names")
    return tuple(modules)


def _in_order_of_need(entries: Mapping[str, Entry]) -> tuple[Entry, ...]:
    """Vocabulary order, except that what others need comes before them."""
    ordered: dict[str, Entry] = {}

    def place(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            circle = " -> ".join([*waiting[waiting.index(name) :], name])
            raise UserError(f"space.{name}: parameters depend on each other in a circle: {circle}")
        if name not in ordered:
            for other in sorted(entries[name].needs):
                place(other, (*waiting, name))
            ordered[name] = entries[name]

    for name in VOCABULARY:
        place(name, ())
    return tuple(ordered.values())


def _check_ties(entries: Sequence[Entry]) -> None:
    """Refuses ties that can lead out of what their parameter allows."""
    ends: dict[str, tuple[float, float]] = {}
    for entry in entries:
        if isinstance(DEFAULTS[entry.name], str | bool):
            continue
        if isinstance(entry.source, Tied):
            ratio = entry.source.ratio
            low, high = (ratio.low, ratio.high) if isinstance(ratio, Range) else (ratio, ratio)
            ends[entry.name] = (low * ends[entry.source.of][0], high * ends[entry.source.of][1])
            # What is rounded to a whole number is at least 1, and so may start below.
            checked = ends[entry.name][1:] if VOCABULARY[entry.name].whole else ends[entry.name]
            for value in checked:
                VOCABULARY[entry.name].check(
                    entry.name, round(value) if VOCABULARY[entry.name].whole else value
                )
        else:
            ends[entry.name] = _ends(entry.source)


def _ends(source: Range | Choice | Fixed) -> tuple[float, float]:
    if isinstance(source, Range):
        return source.low, source.high
    values = source.options if isinstance(source, Choice) else (source.value,)
    numbers = [float(value) for value in values]
    return min(numbers), max(numbers)
