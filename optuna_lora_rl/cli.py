"""The command line: ``optuna-lora-rl``."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated
from typing import Any

import typer
from typer.rich_utils import rich_format_error

from optuna_lora_rl.commands import learning
from optuna_lora_rl.commands import rank
from optuna_lora_rl.commands import study
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.errors import shortened
from optuna_lora_rl.terminal import writable

app = typer.Typer(
    name="optuna-lora-rl",
    help="Finds good LoRA fine-tuning configurations with little compute.\n\n"
    "Begin with [bold]optuna-lora-rl init study.yaml[/], then "
    "[bold]optuna-lora-rl run study.yaml[/].",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (study.app, learning.app, rank.app):
    app.add_typer(commands)


# What a path or a disk may be at fault for, and no program.
_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
}
# Click's, which newer versions of Typer bring under another name.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, and prints whatever goes wrong, without credentials.

    A user's mistake is one sentence and status 2; a bug is a traceback and status 1.
    """
    for stream in (sys.stdout, sys.stderr):
        writable(stream)
    given = None if arguments is None else list(arguments)
    try:
        code = app(args=given, standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except _UsageError as error:
        error.message = shortened(masked(error.message))
        rich_format_error(error)
        code = error.exit_code
    except typer.Abort:
        code = 1
    except Exception as error:
        code = _unexpected(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough, and takes no more at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)


def _unexpected(error: Exception) -> int:
    """Prints what nobody has foreseen: a bug, unless the machine is at fault."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        said = UserError(f"{error.filename}: {error.strerror}")
        print(f"error: {said}", file=sys.stderr)
        return 2
    sys.stderr.write(masked("".join(traceback.format_exception(error))))
    return 1


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
