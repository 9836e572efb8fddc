"""The space: what is tuned in a LoRA fine-tuning run, and over which values.

A ``LoraSpace`` says for every parameter whether it is tuned, fixed, or tied to another one. It
is a plain Optuna citizen: ``LoraSpace.suggest(trial)`` works in any objective, with any sampler.

>>> import optuna
>>> from optuna_lora_rl import LoraSpace
>>> space = LoraSpace({
...     "lora_rank": {"low": 2, "high": 64, "log": True},
...     "lora_alpha": "2 * lora_rank",
...     "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
...     "target_modules": ["qv", "all-linear"],
... })
>>> study = optuna.create_study()
>>> configuration = space.suggest(study.ask())
>>> configuration["lora_alpha"] == 2 * configuration["lora_rank"]
True
"""

from __future__ import annotations

from collections.abc import Callable
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
from optuna_lora_rl.vocabulary import Configuration
from optuna_lora_rl.vocabulary import Value
from optuna_lora_rl.vocabulary import finite_number
from optuna_lora_rl.vocabulary import unknown_parameter

if TYPE_CHECKING:
    import optuna
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


@dataclass(frozen=True)
class Choice:
    """A tuned choice among listed values."""

    options: tuple[Value, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.options)


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


class LoraSpace:
    """Which LoRA parameters are tuned, and over which values.

    Args:
        parameters: For each parameter to mention, one of

            - a value: the parameter is fixed;
            - a list of values: one of them is chosen;
            - ``{"low": ..., "high": ..., "log": bool, "step": ...}``: a range, ends included;
            - ``{"choices": [...]}``, ``{"fixed": value}``: the long forms;
            - ``"2 * lora_rank"`` or ``{"ratio": 2, "of": "lora_rank"}``: tied to another one; a
              ratio that is itself a range is tuned under the name ``<parameter>_ratio``.

            A mapping may add ``"when": {other: [values]}``: the parameter is asked for only when
            the other one has one of these values, and has its default otherwise. Parameters not
            mentioned keep the defaults of ``DEFAULTS``. ``truncate``, a mapping of ``energy`` or
            ``rank`` to one of these forms, stands for ``truncate_energy`` or ``truncate_rank``.
            None means the recommended space.
        target_sets: Names for lists of module-name suffixes of the user's own, to be used as
            values of ``target_modules``.

    Raises:
        UserError: For an unknown parameter, an empty range, or a value that is not allowed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any] | None = None,
        *,
        target_sets: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.target_sets = {
            name: _modules(name, modules) for name, modules in (target_sets or {}).items()
        }
        given = RECOMMENDED if parameters is None else _spelt_out(parameters)
        for name in given:
            if name not in VOCABULARY:
                raise UserError(unknown_parameter(name))
        entries = {name: self._parse(name, form) for name, form in given.items()}
        for name, default in DEFAULTS.items():
            entries.setdefault(name, Entry(name, Fixed(default)))
        self._entries = _in_order_of_need(entries)
        _check_ties(self._entries)

    @classmethod
    def recommended(cls) -> LoraSpace:
        """Rank, alpha, learning rate, dropout and target modules over the usual ranges."""
        return cls(None)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Configuration:
        """Asks ``trial`` for every tuned parameter.

        Returns:
            The whole configuration: every name of the vocabulary with its value.
        """
        return self._walk(lambda name, domain: _ask(trial, name, domain))

    def resolve(self, params: Mapping[str, Value]) -> Configuration:
        """The whole configuration of a trial whose Optuna parameters are ``params``.

        Raises:
            UserError: If ``params`` lacks a tuned parameter.
        """

        def given(name: str, domain: Range | Choice) -> Value:
            if name not in params:
                raise UserError(f"the parameter {name!r} has no value; given: {sorted(params)}")
            return params[name]

        return self._walk(given)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The tuned parameters and their Optuna distributions, conditional ones included."""
        tuned = (entry.tuned() for entry in self._entries)
        return {name: domain.distribution() for name, domain in filter(None, tuned)}

    def fixed(self) -> dict[str, Value | str]:
        """What is not tuned: fixed values, and ties in words."""
        untuned: dict[str, Value | str] = {}
        for entry in self._entries:
            if isinstance(entry.source, Fixed):
                untuned[entry.name] = entry.source.value
            elif isinstance(entry.source, Tied) and entry.tuned() is None:
                untuned[entry.name] = f"{entry.source.ratio:g} * {entry.source.of}"
        return untuned

    def _walk(self, draw: Callable[[str, Range | Choice], Value]) -> Configuration:
        configuration: Configuration = {}
        for entry in self._entries:
            if not entry.when.holds(configuration):
                configuration[entry.name] = DEFAULTS[entry.name]
                continue
            tuned = entry.tuned()
            drawn = draw(*tuned) if tuned else None
            configuration[entry.name] = entry.value(drawn, configuration)
        return {name: configuration[name] for name in VOCABULARY}

    def _parse(self, name: str, form: Any) -> Entry:
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
            if side not in VOCABULARY:
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
        if name == "target_modules" and checked not in (*TARGET_PRESETS, *self.target_sets):
            known = [*TARGET_PRESETS, *self.target_sets]
            raise UserError(
                f"space.target_modules: {value!r} is not known; use one of {', '.join(known)}, "
                "or define the name under target_sets"
            )
        return checked


RECOMMENDED: dict[str, Any] = {
    "lora_rank": Range(2, 64, log=True, whole=True),
    "lora_alpha": Range(1, 256, log=True, whole=True),
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "lora_dropout": Range(0.0, 0.3),
    "target_modules": Choice(TARGET_PRESETS),
}


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


def _ask(trial: optuna.trial.BaseTrial, name: str, domain: Range | Choice) -> Value:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.options)  # type: ignore[return-value]
    if domain.whole:
        step = int(domain.step or 1)
        return trial.suggest_int(
            name, int(domain.low), int(domain.high), log=domain.log, step=step
        )
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)


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


def _modules(name: str, modules: Any) -> tuple[str, ...]:
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
