"""What is known of a fine-tuning before its first trial: the model, the data, the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields
from numbers import Integral
from numbers import Real
from pathlib import Path
from typing import Any
from typing import Literal

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.errors import not_installed

Method = Literal["sft", "dpo", "kto", "grpo"]
Quantization = Literal["none", "8bit", "4bit"]
METHODS = ("sft", "dpo", "kto", "grpo")
QUANTIZATIONS = ("none", "8bit", "4bit")
# Whole numbers; the rest are numbers.
_COUNTS = ("hidden_size", "layers", "parameters", "examples", "steps", "batch_size")
_LARGEST = 1e18
# How configurations of transformers call the width and the depth.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


@dataclass(frozen=True, kw_only=True)
class TuningContext:
    """What is known of a fine-tuning before its first trial; whatever is not known is left out.

    The learning rate that is expected to be best, how sure that is, the rank, the dropout and the
    target modules follow from it (:mod:`optuna_lora_rl.policy.scaling`).

    >>> TuningContext(hidden_size=4096, examples=50_000, method="sft").hidden_size
    4096

    Args:
        hidden_size: width of the model's residual stream.
        layers: its blocks.
        parameters: its parameters, those of the base model alone.
        quantization: of the base model: ``"none"``, ``"8bit"`` or ``"4bit"``. It is kept with the
            study and moves nothing: no measurement says that it should.
        examples: number of training examples.
        tokens: their mean number of tokens.
        steps: optimizer steps of a run, where they are not tuned.
        batch_size: examples a step, where they are not tuned.
        method: ``"sft"``, ``"dpo"``, ``"kto"`` or ``"grpo"``.

    Raises:
        UserError: a value is not one of these.
    """

    hidden_size: int | None = None
    layers: int | None = None
    parameters: int | None = None
    quantization: Quantization | None = None
    examples: int | None = None
    tokens: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    method: Method | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None:
                continue
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not (whole and 1 <= value <= _LARGEST):
                raise UserError(
                    f"context: {name} is {value!r}, but must be a whole number, at least 1"
                )
            object.__setattr__(self, name, int(value))
        tokens: Any = self.tokens
        if tokens is not None:
            number = isinstance(tokens, Real) and not isinstance(tokens, bool)
            if not (number and 0 < tokens <= _LARGEST):
                raise UserError(f"context: tokens is {tokens!r}, but must be a number over 0")
            object.__setattr__(self, "tokens", float(tokens))
        for name, allowed in (("method", METHODS), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(
                    f"context: {name} is {value!r}, but must be one of {', '.join(allowed)}"
                )

    @classmethod
    def of(cls, model: Any, **known: Any) -> TuningContext:
        """What a model says of itself.

        >>> TuningContext.of({"hidden_size": 2048, "num_hidden_layers": 16}, method="dpo")
        TuningContext(hidden_size=2048, layers=16, method='dpo')

        Args:
            model: a loaded model, its configuration (of transformers, or a mapping), a local
                folder, or a name on the hub, of which the configuration alone is downloaded.
            **known: further fields, which win over what the model says.

        Raises:
            UserError: there is no such model, it does not say how wide it is, or a field is not
                one of the class or has a bad value.
        """
        if unknown := known.keys() - {one.name for one in fields(cls)}:
            names = ", ".join(one.name for one in fields(cls))
            raise UserError(f"context: there is no {min(unknown)!r}; allowed: {names}")
        config = _configuration(model)
        # Of a multimodal model the part that reads text.
        text = next((config[k] for k in ("text_config", "llm_config") if config.get(k)), config)
        text = text if isinstance(text, Mapping) else text.to_dict()
        width, depth = _first(text, _WIDTHS), _first(text, _DEPTHS)
        if width is None and not {"hidden_size", "parameters"} & known.keys():
            raise UserError(
                f"context: {_named(model)} does not say how wide it is; give hidden_size"
            )
        found: dict[str, Any] = {"hidden_size": width, "layers": depth}
        found["parameters"] = _parameters(model)
        found["quantization"] = _quantization(config.get("quantization_config"))
        return cls(**{**found, **known})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuningContext:
        """The context that :meth:`as_dict` wrote down."""
        return cls(**{one.name: values.get(one.name) for one in fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        """What is known, as plain values by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def width(self) -> float | None:
        """The hidden size, guessed from the parameters where it is not known.

        A transformer has about 12 parameters for each block and pair of hidden units (Kaplan et
        al. 2020, section 2.1), and is about 128 times as wide as deep.
        """
        if self.hidden_size is not None:
            return float(self.hidden_size)
        return None if self.parameters is None else (self.parameters * 128.0 / 12.0) ** (1 / 3)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"TuningContext({said})"


def _configuration(model: Any) -> Mapping[str, Any]:
    """The configuration behind whatever stands for a model."""
    if isinstance(model, Mapping):
        return model
    if isinstance(model, str | Path):
        return _read(str(model))
    config = getattr(model, "config", model)
    if isinstance(config, Mapping):
        return config
    if callable(getattr(config, "to_dict", None)):
        read: Mapping[str, Any] = config.to_dict()
        return read
    raise UserError(
        f"context: {_named(model)} is no model, configuration, folder or name on the hub"
    )


def _read(name: str) -> Mapping[str, Any]:
    """The configuration of a folder, or of a name on the hub."""
    file = Path(name) / "config.json"
    if not Path(name).exists():
        try:
            from huggingface_hub import hf_hub_download
        except ModuleNotFoundError as error:
            raise UserError(not_installed(f"context: the name {name!r}", error)) from error
        try:
            file = Path(hf_hub_download(name, "config.json"))
        except Exception as error:
            raise UserError(
                f"context: {name!r} is no local folder, and the hub gave no configuration: "
                f"{first_line(error)}"
            ) from error
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"context: {str(file)!r} cannot be read as a configuration") from error
    if not isinstance(config, Mapping):
        raise UserError(f"context: {str(file)!r} cannot be read as a configuration")
    return config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (config.get(name) for name in names)
    return next((int(v) for v in found if isinstance(v, Integral) and int(v) > 0), None)


def _parameters(model: Any) -> int | None:
    """How many parameters a loaded model has, adapters left out."""
    named = getattr(model, "named_parameters", None)
    if not callable(named):
        return None
    # A weight of four bits is stored as half as many bytes.
    counts = [_count(p) for name, p in named() if "lora_" not in name]
    return sum(counts) or None


def _count(parameter: Any) -> int:
    packed = type(parameter).__name__ == "Params4bit" and parameter.element_size() == 1
    return int(parameter.numel()) * (2 if packed else 1)


def _quantization(said: Any) -> Quantization | None:
    if not said:
        return "none"
    values = said if isinstance(said, Mapping) else said.to_dict()
    if values.get("load_in_4bit") or values.get("bits") == 4:
        return "4bit"
    return "8bit" if values.get("load_in_8bit") or values.get("bits") == 8 else None


def _named(model: Any) -> str:
    text = repr(model) if isinstance(model, str | Path) else f"the {type(model).__name__}"
    return text if len(text) < 80 else text[:77] + "..."


def in_words(value: float) -> str:
    """A number with at most two digits that count, such as 9e-3 or 0.05.

    >>> in_words(0.0093), in_words(12345.0), in_words(0.05)
    ('9e-3', '12000', '0.05')
    """
    if value <= 0:
        return "0"
    if value >= 0.01:
        return f"{float(f'{value:.2g}'):.10g}"
    exponent = math.floor(math.log10(value))
    digit = value / 10.0**exponent
    return f"{digit:.0f}e{exponent}" if round(digit) < 10 else f"1e{exponent + 1}"
