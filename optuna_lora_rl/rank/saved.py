"""Adapters on disk in PEFT's format, read and written without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import places
from optuna_lora_rl.rank.layers import Factors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter as it lies in a folder.

    Attributes:
        config: The contents of its ``adapter_config.json``.
        tensors: All its tensors, by PEFT's names.
        factors: The updates of its linear layers, by the layers' names.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    factors: dict[str, Factors]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

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
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        missing = Path(error.filename or WEIGHTS_FILE).name
        raise UserError(f"the folder {str(folder)!r} holds no adapter: no {missing}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {str(folder)!r} cannot be read: {error}") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"the adapter in {str(folder)!r} is of type {kind}, not LORA")
    factors = _factors(config, tensors)
    if not factors:
        raise UserError(f"the adapter in {str(folder)!r} has no linear LoRA layers")
    return SavedAdapter(config=config, tensors=tensors, factors=factors)


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


def _factors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
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
        # The rank is that of the tensors; alpha has no other place than the configuration.
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"])
        scaling = layers.scaling_of(alpha, a.shape[0], bool(config.get("use_rslora")))
        found[name] = Factors(a=a, b=b, scaling=scaling)
    # Files sort block 10 before block 2.
    return {name: found[name] for name in places.in_order(found)}
