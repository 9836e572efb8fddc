"""The terminal, or the file in its place: which characters it has, and how wide it is."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING
from typing import TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Columns of output that goes to a file or a pipe.
_FILE_WIDTH = 140
_ERRORS = "optuna_lora_rl.plain"
# What is written where an encoding has not the character.
_PLAIN = {
    "α": "alpha",
    "·": "-",
    "–": "-",
    "−": "-",
    "…": "...",
    "→": "->",
    "±": "+-",
    "×": "x",
    "★": "*",
    "’": "'",
    "█": "#",
    "▇": "#",
    "▆": "+",
    "▅": "+",
    "▄": "=",
    "▃": "-",
    "▂": "_",
    "▁": "_",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end


codecs.register_error(_ERRORS, _plain)


def writable(stream: TextIO) -> None:
    """Has a stream write, for a character that its encoding has not, another in its place.

    The output of a study holds such characters as the alpha of ``lora_alpha``; a pipe on Windows
    is cp1252, and ``PYTHONIOENCODING`` may be anything.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _ERRORS:
        stream.reconfigure(errors=_ERRORS)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns standard output, or standard error, as a console that takes text as it is.

    Square brackets are no markup in it: names, values and messages of a user's go through it.

    Args:
        stderr: Standard error instead.
        quiet: Nothing is written.
    """
    from rich.console import Console

    writable(sys.stderr if stderr else sys.stdout)
    terminal = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)
    if not terminal.is_terminal and "COLUMNS" not in os.environ:
        terminal.width = _FILE_WIDTH
    return terminal
