"""Fine-tuning tasks for real models, made from well-kept packages (the extra ``real``).

``real:extraction`` (Faker), ``real:dates`` and ``real:numbers`` (Babel), ``real:inflection``
(LemmInflect) and ``reasoning_gym:<generator>`` (reasoning-gym). Rows are chats of one question and
its answer: ``prompt`` and ``completion`` are lists of one message. What a task holds follows from
its name and the package's version. Splits share nothing that is asked for: no person, no date, no
amount, no word, no question.
"""

from __future__ import annotations

from optuna_lora_rl.real.tasks import PREFIXES
from optuna_lora_rl.real.tasks import TASKS
from optuna_lora_rl.real.tasks import load

__all__ = ["PREFIXES", "TASKS", "load"]
