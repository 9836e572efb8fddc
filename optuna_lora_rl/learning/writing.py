"""Parts of the pages that record a comparison."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna_lora_rl.learning.statistics import Interval


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"Python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def footer(command: str, of: Mapping[str, str]) -> list[str]:
    """The command and versions under a record's tables."""
    said = ", ".join(f"{name} {number}" for name, number in of.items())
    return [f"`{command}`", "", f"{said}.", ""]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table's lines."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def cell(found: Interval, form: str = ".3f") -> str:
    """A mean with its interval."""
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
