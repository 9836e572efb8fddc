"""Real text that every Python installation has: the standard library's own files.

``RESERVED`` names the packages and modules whose text belongs to the fine-tuning tasks;
pretraining reads everything else, so that no task text was seen by the base model.
"""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path

RESERVED = (
    "asyncio",
    "email",
    "http",
    "logging",
    "mailbox.py",
    "multiprocessing",
    "tarfile.py",
    "threading.py",
    "unittest",
    "urllib",
    "xml",
)

# Absent from some distributions, no prose or code of their own (tables of characters), or tests.
_LEFT_OUT = frozenset(
    {
        "__pycache__",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
        "turtle.py",
    }
)


@cache
def _folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def read(relative: str) -> str:
    """Return one file's text; ``relative`` is its path below the standard library's folder."""
    return (_folder() / relative).read_text(encoding="utf-8", errors="replace")


@cache
def reserved_files() -> tuple[str, ...]:
    """Return the relative paths of the files that the tasks are made from, sorted."""
    return tuple(path for path in _files() if path.split("/")[0] in RESERVED)


@cache
def pretraining_files() -> tuple[str, ...]:
    """Return the relative paths of the files that pretraining may read, sorted."""
    return tuple(path for path in _files() if path.split("/")[0] not in RESERVED)


@cache
def _files() -> tuple[str, ...]:
    found = []
    for path in _folder().rglob("*.py"):
        parts = path.relative_to(_folder()).parts
        platform_settings = parts[0].startswith(("config-", "_sysconfigdata"))
        if not _LEFT_OUT.intersection(parts) and not platform_settings:
            found.append("/".join(parts))
    return tuple(sorted(found))


def documented(relative: str) -> list[tuple[str, str]]:
    """Return (declaration, docstring) of each documented function and class of one file.

    A declaration is one line: ``def name(arguments):``, preceded by its class where it has one
    (``class Name: def name(arguments):``).
    """
    pairs: list[tuple[str, str]] = []

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, child.name)
                declaration = f"class {child.name}:"
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                prefix = f"class {owner}: " if owner else ""
                declaration = f"{prefix}def {child.name}({ast.unparse(child.args)}):"
            else:
                continue
            docstring = ast.get_docstring(child)
            if docstring:
                pairs.append((declaration, docstring))

    visit(ast.parse(read(relative)), "")
    return pairs
