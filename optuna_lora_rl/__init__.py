"""Finds good LoRA fine-tuning configurations with little compute, by a learned Optuna sampler.

The names below load on first use, so that ``from optuna_lora_rl import RLSampler`` imports
neither transformers, TRL nor PEFT. ``tune`` needs ``pip install 'optuna_lora_rl[finetune]'``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import not_installed

if TYPE_CHECKING:
    from optuna_lora_rl.policy.context import TuningContext
    from optuna_lora_rl.samplers.bandit import BanditSampler
    from optuna_lora_rl.samplers.explanation import explain
    from optuna_lora_rl.samplers.rl import RLSampler
    from optuna_lora_rl.space import LoraSpace
    from optuna_lora_rl.study.tuning import tune

__version__ = "0.1.0"
__all__ = ["BanditSampler", "LoraSpace", "RLSampler", "TuningContext", "explain", "tune"]

_HOMES = {
    "BanditSampler": "optuna_lora_rl.samplers.bandit",
    "LoraSpace": "optuna_lora_rl.space",
    "RLSampler": "optuna_lora_rl.samplers.rl",
    "TuningContext": "optuna_lora_rl.policy.context",
    "explain": "optuna_lora_rl.samplers.explanation",
    "tune": "optuna_lora_rl.study.tuning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            sentence = not_installed(name, error)
            raise ModuleNotFoundError(sentence, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
