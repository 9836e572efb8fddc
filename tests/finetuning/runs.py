"""What the tests of single runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna_lora_rl.finetuning.finetuner import FineTuner

Make = Callable[..., FineTuner]
Hash = Callable[[FineTuner], str]
QUICK: dict[str, Any] = {"max_steps": 4, "learning_rate": 5e-3}


class Pruned(Exception):
    pass


def tuner_ready(tuner: FineTuner) -> FineTuner:
    tuner.prepare()
    return tuner


def loss_of_saved(tuner: FineTuner, adapter: Path) -> float:
    """Loads an adapter as a user of PEFT would and evaluates it on the validation set."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tuner.model.name)
    model = PeftModel.from_pretrained(fresh, adapter)
    return tuner.workspace.evaluate(model, tuner.prepared.tokens.validation, None)["loss"]
