"""One trial: data, base model, LoRA adapter, TRL SFT run, evaluation, cost and score.

Nothing here knows Optuna: a trial is handed plain parameters and a function to report to.
``options`` is light; the modules that need transformers, TRL or PEFT load when a trial is
prepared.
"""

from __future__ import annotations
