"""The command line: ``optuna-lora-rl``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from optuna_lora_rl.commands import learning
from optuna_lora_rl.commands import rank
from optuna_lora_rl.commands import study
from optuna_lora_rl.errors import UserError

app = typer.Typer(
    name="optuna-lora-rl",
    help="Finds good LoRA fine-tuning configurations with little compute.\n\n"
    "Begin with [bold]optuna-lora-rl init study.yaml[/], then "
    "[bold]optuna-lora-rl run study.yaml[/].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (study.app, learning.app, rank.app):
    app.add_typer(commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 and one sentence on a user's mistake."""
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stderr.close()
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        from optuna_lora_rl import __version__

        print(f"optuna-lora-rl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
