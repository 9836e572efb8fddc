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
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.space_forms import Choice
from optuna_lora_rl.space_forms import Fixed
from optuna_lora_rl.space_forms import Range
from optuna_lora_rl.space_forms import Tied
from optuna_lora_rl.space_forms import entries_of
from optuna_lora_rl.space_forms import modules_of
from optuna_lora_rl.vocabulary import DEFAULTS
from optuna_lora_rl.vocabulary import TARGET_PRESETS
from optuna_lora_rl.vocabulary import VOCABULARY
from optuna_lora_rl.vocabulary import Configuration
from optuna_lora_rl.vocabulary import Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


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
            ``"defaults": True`` keeps what the recommended space tunes of what is not mentioned.
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
            name: modules_of(name, modules) for name, modules in (target_sets or {}).items()
        }
        self._entries = entries_of(_mentioned(parameters), self.target_sets)

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

    def middle(self) -> Configuration:
        """The whole configuration in the middle of the space."""
        return self._walk(lambda name, domain: domain.middle())

    def distributions(self) -> dict[str, BaseDistribution]:
        """The tuned parameters and their Optuna distributions, conditional ones included."""
        tuned = (entry.tuned() for entry in self._entries)
        return {name: domain.distribution() for name, domain in filter(None, tuned)}

    def count(self, limit: int = 4096) -> int | None:
        """How many different configurations there are, or None where they are over ``limit``."""
        found: list[Configuration] = [{}]
        for entry in self._entries:
            grown: list[Configuration] = []
            for configuration in found:
                values: Sequence[Value | None] | None = [None]
                if not entry.when.holds(configuration):
                    grown.append({**configuration, entry.name: DEFAULTS[entry.name]})
                    continue
                if (tuned := entry.tuned()) is not None:
                    values = tuned[1].values()
                if values is None or len(grown) + len(values) > limit:
                    return None
                for value in values:
                    drawn = entry.value(value, configuration)
                    grown.append({**configuration, entry.name: drawn})
            found = grown
        return len({tuple(configuration.values()) for configuration in found})

    def fixed(self) -> dict[str, Value | str]:
        """What is not tuned: fixed values, and ties in words."""
        untuned: dict[str, Value | str] = {}
        for entry in self._entries:
            if isinstance(entry.source, Fixed):
                untuned[entry.name] = entry.source.value
            elif isinstance(entry.source, Tied) and entry.tuned() is None:
                untuned[entry.name] = f"{entry.source.ratio:g} * {entry.source.of}"
        return untuned

    def values(self, name: str) -> tuple[Value, ...]:
        """The values that a parameter without a range can have."""
        found: tuple[Value, ...] = ()
        always = False
        for entry in self._entries:
            if entry.name != name:
                continue
            always = not entry.when.values
            if isinstance(entry.source, Choice):
                found = entry.source.options
            elif isinstance(entry.source, Fixed):
                found = (entry.source.value,)
        return found if always else tuple(dict.fromkeys((*found, DEFAULTS[name])))

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


RECOMMENDED: dict[str, Any] = {
    "lora_rank": Range(2, 64, log=True, whole=True),
    "lora_alpha": Range(1, 256, log=True, whole=True),
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "lora_dropout": Range(0.0, 0.3),
    "target_modules": Choice(TARGET_PRESETS),
}


def _mentioned(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if parameters is None:
        return RECOMMENDED
    own = dict(parameters)
    keep = own.pop("defaults", False)
    if not isinstance(keep, bool):
        raise UserError(f"space.defaults: {keep!r} is not allowed; use true or false")
    return {**RECOMMENDED, **own} if keep else own


def _ask(trial: optuna.trial.BaseTrial, name: str, domain: Range | Choice) -> Value:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.options)  # type: ignore[return-value]
    if domain.whole:
        step = int(domain.step or 1)
        return trial.suggest_int(
            name, int(domain.low), int(domain.high), log=domain.log, step=step
        )
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)
