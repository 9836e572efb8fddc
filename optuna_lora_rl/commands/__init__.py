"""The commands of ``optuna-lora-rl``: one short function each, with no logic of its own."""
