"""Objects of anybody's, by the path that imports them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line


def imported(key: str, path: str) -> Any:
    """Return the object that a path names.

    Args:
        key: Where the file says it, for the error.
        path: ``module:name``; modules are looked for in the current folder, too.

    Raises:
        UserError: The path is of another form, or there is no such module or name.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"{key} is {path!r}, but must be a module and a name, such as 'mine:Mine'")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise UserError(f"{key}: the module {module!r} has no {name!r}") from None
    except Exception as error:
        # Whatever somebody's module raises while it is imported.
        raise UserError(
            f"{key}: the module {module!r} cannot be imported: {first_line(error)}"
        ) from error


def source(thing: Any) -> bytes:
    """Return the content of the file that defines a function or class; empty if there is none."""
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:
        return b""
    return Path(file).read_bytes() if file else b""
