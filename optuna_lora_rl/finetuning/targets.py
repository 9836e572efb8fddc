"""From a preset or a user's list to the modules of one model, and to PEFT's words for them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from difflib import get_close_matches

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.architecture import Architecture
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.architecture import layer_of
from optuna_lora_rl.vocabulary import TARGET_PRESETS

_ROLES = {
    "qv": ("query", "value", "fused"),
    "attention": ("query", "key", "value", "fused", "attention-output"),
    "mlp": ("mlp-in", "mlp-out"),
}


def select(
    architecture: Architecture,
    target: str,
    layers: str = "all",
    target_sets: Mapping[str, Sequence[str]] | None = None,
) -> tuple[LinearModule, ...]:
    """Returns the linear modules that a trial adapts.

    Args:
        architecture: The model's modules.
        target: A preset (``qv``, ``attention``, ``mlp``, ``all-linear``) or a name of
            ``target_sets``.
        layers: ``all``, ``first-half``, ``last-half``, ``middle``, or indices ``"0,2,5-7"``.
        target_sets: The user's own lists of module names; a name means every module whose path
            ends with it.

    Raises:
        UserError: When a name is unknown, or nothing is left to adapt.
    """
    chosen = _of_target(architecture, target, target_sets or {})
    if layers != "all":
        wanted = layer_indices(layers, architecture.layers)
        chosen = [linear for linear in chosen if linear.layer in wanted]
    if not chosen:
        raise UserError(
            f"target_modules {target!r} with layers {layers!r} names no linear module of this "
            f"{architecture.model_type} model; its linear modules are {_leaves(architecture)}"
        )
    return tuple(chosen)


def layer_indices(layers: str, count: int) -> frozenset[int]:
    """Returns the block indices that ``layers`` means in a model of ``count`` blocks.

    Raises:
        UserError: When an index is out of range.
    """
    half = max(1, count // 2)
    named = {
        "all": range(count),
        "first-half": range(half),
        "last-half": range(count - half, count),
        "middle": range(count // 4, count - count // 4),
    }
    if layers in named:
        return frozenset(named[layers])
    indices: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.partition("-")
        indices.update(range(int(first), int(last or first) + 1))
    if not indices or max(indices) >= count:
        raise UserError(f"layers is {layers!r}, but this model has the layers 0 to {count - 1}")
    return frozenset(indices)


def peft_names(
    architecture: Architecture, chosen: Sequence[LinearModule]
) -> tuple[list[str], list[int] | None]:
    """Says a choice of modules in PEFT's ``target_modules`` and ``layers_to_transform``.

    Short names are what adapters on the hub have and what other tools read, so each module is
    named by the shortest end of its path that means no module outside the choice; where there is
    none (BERT's two ``output.dense``), by its whole path.
    """
    inside = {linear.layer for linear in chosen}
    partial = None not in inside and len(inside) < architecture.layers
    wanted = {linear.name for linear in chosen}
    seen = [name for name in architecture.module_names if not partial or layer_of(name) in inside]
    names: set[str] = set()
    for linear in chosen:
        parts = linear.name.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
        short = next((end for end in ends if _means(end, seen) <= wanted), linear.name)
        names.add(short)
    layers = sorted(index for index in inside if index is not None) if partial else None
    return sorted(names), layers


def _of_target(
    architecture: Architecture, target: str, target_sets: Mapping[str, Sequence[str]]
) -> list[LinearModule]:
    if target in target_sets:
        return _of_names(architecture, target, target_sets[target])
    if target == "all-linear":
        return list(architecture.linears)
    if target not in _ROLES:
        known = ", ".join((*TARGET_PRESETS, *target_sets))
        raise UserError(f"target_modules is {target!r}; it is one of {known}")
    chosen = [linear for linear in architecture.linears if linear.role in _ROLES[target]]
    return chosen or (_peft_default(architecture) if target == "qv" else [])


def _of_names(architecture: Architecture, target: str, names: Sequence[str]) -> list[LinearModule]:
    meant: set[str] = set()
    linear_names = [linear.name for linear in architecture.linears]
    for name in names:
        matches = _means(name, linear_names)
        if not matches:
            raise UserError(_unknown_module(architecture, target, name))
        meant |= matches
    return [linear for linear in architecture.linears if linear.name in meant]


def _unknown_module(architecture: Architecture, target: str, name: str) -> str:
    if _means(name, architecture.module_names):
        return f"target_sets.{target}: {name!r} is no linear module that can be adapted"
    leaves = sorted({linear.name.rsplit(".", 1)[-1] for linear in architecture.linears})
    close = get_close_matches(name, leaves, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {_leaves(architecture)}"
    kind = architecture.model_type
    return f"target_sets.{target}: this {kind} model has no module {name!r}; {hint}"


def _peft_default(architecture: Architecture) -> list[LinearModule]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture.model_type, [])
    if isinstance(names, str):
        return []
    return [
        linear
        for linear in architecture.linears
        if any(_means(name, [linear.name]) for name in names)
    ]


def _means(end: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if name == end or name.endswith(f".{end}")}


def _leaves(architecture: Architecture) -> str:
    return ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in architecture.linears}))
