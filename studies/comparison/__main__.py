"""``python -m studies.comparison FILE``: runs the comparison that a file describes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.terminal import console
from studies.comparison import command


def main(
    file: Annotated[Path, typer.Argument(metavar="FILE.YAML", help="Samplers and problems.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results.")
    ] = None,
    samplers: Annotated[
        str | None, typer.Option(help="Some of the file's samplers, separated by commas.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Studies of each on each.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, of one thread.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Over the file.")
    ] = [],  # noqa: B006
) -> None:
    """Compare samplers on problems whose best value is known.

    Running it again goes on with what is missing.
    """
    said: dict[str, Any] = {"seeds": seeds, "workers": workers}
    overrides = [*overrides, *(f"{k}={v}" for k, v in said.items() if v is not None)]
    names = None if samplers is None else [name.strip() for name in samplers.split(",")]
    try:
        command.from_file(file, names, output, overrides, console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on with what is missing.")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
