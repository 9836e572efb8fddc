"""Measured LoRA response tables: real fine-tuning runs over a design of configurations.

Each table is one task (a built-in base model, a data family, a size) measured at the same
quasi-random configurations, with learning curves and, for a part, a second seed::

    from optuna_lora_rl.learning import tables

    for table in tables.load("train"):
        print(table.task.name, table.quality[:, -1].max(), table.noise)

``python -m studies.tables``, in a clone, measures and compiles them; ``docs/tables.md``
describes the columns, how many runs there are and how good the fitted surfaces are.
"""

from __future__ import annotations

from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.dataset import load
from optuna_lora_rl.learning.tables.design import SPLITS
from optuna_lora_rl.learning.tables.design import TASKS

__all__ = ["SPLITS", "TASKS", "Table", "load"]
