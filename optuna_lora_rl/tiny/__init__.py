"""The built-in models and tasks, so that studies, tests and examples run with no network.

``TASKS`` names the tasks, ``load`` returns their examples and ``MODELS`` has the folders of the
models, in Hugging Face format; ``MODEL_FOLDER`` is that of ``tiny``::

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

_FOLDER = Path(__file__).resolve().parent
MODELS = {
    "tiny": _FOLDER / "weights",
    "tiny-narrow": _FOLDER / "weights-narrow",
    "tiny-wide": _FOLDER / "weights-wide",
}
MODEL_FOLDER = MODELS["tiny"]

__all__ = ["FAMILIES", "MODELS", "MODEL_FOLDER", "TASKS", "load"]
