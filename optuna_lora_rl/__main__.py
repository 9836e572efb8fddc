"""``python -m optuna_lora_rl`` is the command ``optuna-lora-rl``."""

from __future__ import annotations

import sys

from optuna_lora_rl.errors import not_installed


def main() -> None:
    """Run the command line; where its packages are not installed, say how they are."""
    try:
        from optuna_lora_rl import cli
    except ModuleNotFoundError as error:
        print(f"error: {not_installed('the command line', error)}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
