"""Adapters on disk in PEFT's format, read and written without loading a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError
from torch import Tensor

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layer_names
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank.layers import Factors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What older versions of PEFT saved.
_PICKLE = "adapter_model.bin"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Starts at which PEFT changes the base weights: the update is what the factors moved since.
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Kinds of LoRA whose update is not scaling * B A, or that have further parts of the rank's shape.
_OTHER_KINDS = ("kasa_config", "arrow_config", "monteclora_config")
# Kinds whose factors are not of the layer's shape.
_OTHER_SHAPES = ("use_bdlora", "use_qalora")
_DEFAULTS = {"r": 8, "lora_alpha": 8}
_Finite = Annotated[float, Field(allow_inf_nan=False)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:40]!r} is no regular expression: {error}") from None
    return pattern


_Pattern = Annotated[str, AfterValidator(_compiles)]


class _Config(BaseModel):
    """What is read of an ``adapter_config.json``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Annotated[int, Field(ge=1)] = _DEFAULTS["r"]
    lora_alpha: _Finite = _DEFAULTS["lora_alpha"]
    rank_pattern: dict[_Pattern, int] | None = None
    alpha_pattern: dict[_Pattern, _Finite] | None = None
    target_parameters: list[str] | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter as it lies in a folder.

    Attributes:
        folder: The folder.
        config: The contents of its ``adapter_config.json``.
        tensors: All its tensors, by PEFT's names.
        factors: The factors of its linear layers, by the layers' names.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    factors: dict[str, Factors]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def check_plain(self) -> None:
        """Checks that the factors are the adapter's whole update of the original base.

        Raises:
            UserError: When the configuration asks for another reading.
        """
        start = str(self.config.get("init_lora_weights"))
        if start.startswith(_MUTATING):
            raise UserError(
                f"the adapter in {str(self.folder)!r} began with init_lora_weights {start}, which "
                "changes the base weights, so that its factors are not its update; save it anew "
                "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        _refuse(self.folder, self.config, _OTHER_KINDS)
        for name, one in self.factors.items():
            if not (one.a.isfinite().all() and one.b.isfinite().all()):
                raise _unreadable(self.folder, WEIGHTS_FILE, f"{name} is not finite")

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
        """Checks that a model has the layers that the adapter is for.

        PEFT leaves out, in silence, what it finds no layer for.

        Args:
            shapes: (d, k) of the model's layers.
            base: Its name, for the message.

        Raises:
            UserError: When the model has not a layer, or one of another shape.
        """
        for name, one in self.factors.items():
            if name not in shapes:
                raise UserError(f"the adapter is of another model: {base} has no layer {name}")
            if shapes[name] != one.shape:
                raise UserError(
                    f"the adapter's {name} is for a weight of {one.shape}, and that of {base} has "
                    f"{shapes[name]}"
                )


def read(folder: str | Path) -> SavedAdapter:
    """Reads a saved adapter.

    Raises:
        UserError: When the folder holds no LoRA adapter in safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = check(folder)
    _refuse(folder, config, _OTHER_SHAPES)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, WEIGHTS_FILE, error) from None
    factors = _factors(folder, config, tensors)
    if not factors:
        raise UserError(f"the adapter in {str(folder)!r} has no linear LoRA layers")
    return SavedAdapter(folder=folder, config=config, tensors=tensors, factors=factors)


def check(folder: str | Path) -> dict[str, Any]:
    """Reads a saved adapter's configuration, and of its weights whether the file is whole.

    Returns:
        The contents of its ``adapter_config.json``.

    Raises:
        UserError: When the folder holds no LoRA adapter in safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors import safe_open

    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            what = f"{name} is no file" if (folder / name).exists() else f"no {name}"
            if name == WEIGHTS_FILE and (folder / _PICKLE).exists():
                what = f"{_PICKLE} is a pickle, which can run code and is not read; save it with "
                what += "safe_serialization=True"
            raise UserError(f"the folder {str(folder)!r} holds no adapter: {what}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{key}: {first['msg']}" if key else "it is no mapping"
        raise _unreadable(folder, CONFIG_FILE, what) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, CONFIG_FILE, error) from None
    if config["peft_type"] != "LORA":
        kind = str(config["peft_type"])[:40]
        raise UserError(f"the adapter in {str(folder)!r} is of type {kind}, not LORA")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):
            return {**_DEFAULTS, **config}
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, WEIGHTS_FILE, error) from None


def _refuse(folder: Path, config: Mapping[str, Any], kinds: Iterable[str]) -> None:
    for kind in kinds:
        if config.get(kind):
            raise UserError(
                f"the adapter in {str(folder)!r} has {kind}, so that its update is not the "
                "product of its factors A and B, and cannot be read from them"
            )


def _unreadable(folder: Path, name: str, why: object) -> UserError:
    reason = (str(why).splitlines() or [type(why).__name__])[0][:200]
    return UserError(f"the adapter in {str(folder)!r} cannot be read: {name}: {reason}")


def write(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
) -> None:
    """Writes an adapter that plain PEFT loads.

    Args:
        folder: Made if need be.
        config: The configuration; ranks, alphas and initialisation are set to fit the factors.
        tensors: Tensors by PEFT's names, of which those of the factors are replaced.
        factors: The updates, by the layers' names.

    Raises:
        UserError: When the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    out = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, one in factors.items():
        out[f"{layers.PREFIX}{name}{_A}"] = one.a.contiguous()
        out[f"{layers.PREFIX}{name}{_B}"] = one.b.contiguous()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(out, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps({**config, **_fitted(config, factors, out)}, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter cannot be written to {str(folder)!r}: {error}") from error


def _fitted(
    config: Mapping[str, Any], factors: Mapping[str, Factors], tensors: Iterable[str]
) -> dict[str, Any]:
    """The entries of a configuration that give each layer its rank and scaling."""
    use_rslora = bool(config.get("use_rslora"))
    ranks = {name: one.rank for name, one in factors.items()}
    alphas = {
        name: layers.alpha_of(one.scaling, one.rank, use_rslora) for name, one in factors.items()
    }
    rank, alpha = config["r"], config["lora_alpha"]
    old: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    if any(_is_other(key, factors) for key in tensors):
        # Layers that are not linear, such as embeddings, live by what the configuration says.
        old = {pattern: config.get(pattern) or {} for pattern in old}
    else:
        rank = max(ranks.values())
        alpha = next(alphas[name] for name in ranks if ranks[name] == rank)
    new: dict[str, dict[str, Any]] = {
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank or old["rank_pattern"]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha or old["alpha_pattern"]},
    }
    return {
        "r": rank,
        "lora_alpha": alpha,
        # PEFT takes the first key that matches.
        **{
            pattern: {**{layers.exactly(n): v for n, v in new[pattern].items()}, **old[pattern]}
            for pattern in new
        },
        # What it was at the start matters no more, and some starts ask for a certain rank.
        "init_lora_weights": True,
    }


def _is_other(key: str, factors: Mapping[str, Factors]) -> bool:
    if ".lora_embedding_" in key:
        return True
    return key.endswith(_A) and key.removesuffix(_A).removeprefix(layers.PREFIX) not in factors


def _is_expert(name: str, experts: Iterable[str]) -> bool:
    # Of several parameters of one module all but one lie under ``base_layer``.
    own = name.removesuffix(".base_layer")
    return any(f".{own}".endswith(f".{path}") for path in experts if path)


def _factors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Factors]:
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    # Experts that lie in one parameter: their factors are many side by side, not one of high rank.
    experts = [path.rpartition(".")[0] for path in config.get("target_parameters") or ()]
    found = {}
    for key, a in tensors.items():
        b = tensors.get(key.removesuffix(_A) + _B)
        name = key.removesuffix(_A).removeprefix(layers.PREFIX)
        if not key.endswith(_A) or b is None or a.ndim != 2 or _is_expert(name, experts):
            continue
        if b.ndim != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] != b.shape[1]:
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)} of {name} are no factors"
            raise _unreadable(folder, WEIGHTS_FILE, shapes)
        # The rank is that of the tensors; alpha has no other place than the configuration.
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"])
        scaling = layers.scaling_of(alpha, a.shape[0], bool(config.get("use_rslora")))
        found[name] = Factors(a=a, b=b, scaling=scaling)
    # Files sort block 10 before block 2.
    return {name: found[name] for name in layer_names.in_order(found)}
