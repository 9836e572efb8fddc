"""Roles: what a parameter does in a LoRA run, recognised from its name and range.

The roles carry what the policy learnt from one study to another. Recognition is conservative:
a short name such as ``r`` or ``alpha`` counts only when its values make sense for LoRA, since
a wrong role costs more trials than a missing one. In a study that is not a LoRA one as a whole
(:func:`is_lora`) no parameter has a role.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from collections.abc import Sequence

ROLES = (
    "learning_rate",
    "rank",
    "alpha",
    "alpha_ratio",
    "dropout",
    "targets",
    "layers",
    "batch_size",
    "weight_decay",
    "warmup",
    "steps",
)

_NAMES = {
    "learning_rate": (
        "learning_rate lr eta base_lr peak_lr max_lr lora_lr lora_learning_rate base_learning_rate"
        " peak_learning_rate max_learning_rate init_lr initial_lr learningrate"
    ),
    "rank": "r rank lora_r lora_rank lora_dim adapter_rank peft_r",
    "alpha": "alpha lora_alpha peft_alpha adapter_alpha",
    "alpha_ratio": (
        "alpha_ratio lora_alpha_ratio alpha_over_rank alpha_over_r alpha_to_rank alpha_rank_ratio"
        " alpha_r_ratio lora_alpha_over_rank alpha_multiplier scaling lora_scaling lora_scale"
    ),
    "dropout": "dropout lora_dropout adapter_dropout dropout_rate dropout_p",
    "targets": (
        "target_modules targets target lora_target lora_targets lora_target_modules"
        " target_module modules lora_modules"
    ),
    "layers": "layers layers_to_transform lora_layers target_layers",
    "batch_size": (
        "batch_size bs batch per_device_train_batch_size train_batch_size global_batch_size"
        " effective_batch_size per_device_batch_size"
    ),
    "weight_decay": "weight_decay wd decay",
    "warmup": "warmup warmup_ratio warmup_steps warmup_fraction num_warmup_steps",
    "steps": (
        "max_steps steps train_steps num_steps num_train_epochs epochs num_epochs n_epochs"
        " train_epochs max_epochs iterations"
    ),
}
_ROLE_OF_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}

# Name of a role -> smallest "low" and largest "high" that still make sense for it.
_PLAUSIBLE = {
    "learning_rate": (0.0, 10.0),
    "rank": (1.0, 4096.0),
    "alpha": (0.01, 65536.0),
    "alpha_ratio": (0.001, 1024.0),
    "dropout": (0.0, 1.0),
    "batch_size": (1.0, 1_000_000.0),
    "weight_decay": (0.0, 10.0),
    "warmup": (0.0, 1_000_000.0),
    "steps": (0.0, 1e9),
}


def _plain(name: str) -> str:
    """``training.LoRA-Alpha`` -> ``lora_alpha``."""
    last = re.split(r"[./:]|__", name.strip())[-1]
    snake = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", last)
    plain = re.sub(r"[^a-z0-9]+", "_", snake.lower()).strip("_")
    return re.sub(r"(^|_)lo_ra(_|$)", r"\1lora\2", plain)


def recognise(
    name: str, kind: str, low: float, high: float, choices: Sequence[object] = ()
) -> str | None:
    """The role of a parameter, or ``None``.

    Args:
        name: the parameter's name; only its last dotted part counts.
        kind: ``"float"``, ``"int"`` or ``"categorical"``.
        low: smallest value of a numeric parameter.
        high: largest value of a numeric parameter.
        choices: the values of a categorical parameter.
    """
    plain = _plain(name)
    role = _ROLE_OF_NAME.get(plain)
    if role is None:
        return None
    numbers = [value for value in choices if isinstance(value, int | float)]
    numeric = kind != "categorical" or (
        len(numbers) == len(choices) and not any(isinstance(c, bool) for c in choices)
    )
    if role in ("targets", "layers"):
        return None if numeric else role
    # NaN, infinities, and whole numbers that are too large for a float.
    if not numeric or not all(abs(value) <= sys.float_info.max for value in numbers):
        return None
    if kind == "categorical":
        low, high = float(min(numbers)), float(max(numbers))
    smallest, largest = _PLAUSIBLE[role]
    if low < smallest or high > largest:
        return None
    if role == "rank" and any(value != int(value) for value in numbers or [low, high]):
        return None
    if role == "alpha" and plain == "alpha" and high < 4:
        return None  # a penalty's or a mixture's alpha, not LoRA's
    if plain == "eta" and high > 1:
        return None
    return role


def is_lora(names: Iterable[str], roles: Iterable[str]) -> bool:
    """Whether parameters are those of a LoRA study.

    A parameter is called after LoRA; or there is a rank, or a ratio of alpha to it, and another
    role beside; or target modules and a learning rate. No single role is enough: a learning rate,
    a batch size or a dropout is found in the studies of many trades, and a rank is, too.

    Args:
        names: of the parameters.
        roles: what they were recognised as.
    """
    found = set(roles)
    # Not the "lora" of exploration.
    named = any(re.search(r"(?<![a-z])lora(?![a-z])", name.lower()) for name in names)
    sized = bool(found & {"rank", "alpha_ratio"}) and len(found) > 1
    return named or sized or {"targets", "learning_rate"} <= found
