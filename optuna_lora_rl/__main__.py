"""``python -m optuna_lora_rl`` is the command ``optuna-lora-rl``."""

from optuna_lora_rl.cli import main

if __name__ == "__main__":
    main()
