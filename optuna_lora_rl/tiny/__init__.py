"""The built-in model and tasks, so that studies, tests and examples run with no network.

``TASKS`` names the tasks, ``load`` returns their examples and ``MODEL_FOLDER`` is an ordinary
Hugging Face folder::

    from transformers import AutoModelForCausalLM
    from optuna_lora_rl import tiny

    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL_FOLDER)
    examples = tiny.load("dates-small", "train")
"""

from __future__ import annotations

from pathlib import Path

from optuna_lora_rl.tiny.tasks import FAMILIES
from optuna_lora_rl.tiny.tasks import TASKS
from optuna_lora_rl.tiny.tasks import load

MODEL_FOLDER = Path(__file__).resolve().parent / "weights"

__all__ = ["FAMILIES", "MODEL_FOLDER", "TASKS", "load"]
