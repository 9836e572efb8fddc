"""Measuring and fitting of the response tables that ``optuna_lora_rl.learning.tables`` loads.

Run from a clone: ``python -m studies.tables`` says how.
"""
