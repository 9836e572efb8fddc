"""What is measured once and kept on disk: the untuned model, the reference run, probes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna_lora_rl.errors import UserError


def once(
    folder: Path | None,
    kind: str,
    facts: Mapping[str, Any],
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Returns a measurement from disk, or makes it and keeps it.

    Args:
        folder: Where to keep it, or None for nowhere.
        kind: Name of the subfolder.
        facts: All that the measurement depends on; other facts, another measurement.
        measure: Makes it.

    Raises:
        UserError: When the folder cannot be written.
    """
    if folder is None:
        return measure()
    text = json.dumps(dict(facts), sort_keys=True)
    path = folder / kind / f"{digest(text)}.json"
    saved = _read(path)
    if saved is None:
        saved = measure()
        _write(path, saved)
    return saved


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """What was written, or None where nothing was or it has changed since."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != {"values", "sum"}:
        return None
    is_intact = entry["sum"] == digest(json.dumps(entry["values"]))
    return entry["values"] if is_intact else None


def _write(path: Path, values: dict[str, Any]) -> None:
    # Through another file, so that a killed process leaves all or nothing.
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"values": values, "sum": digest(json.dumps(values))}
        unfinished.write_text(json.dumps(entry), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise unwritable(path.parent, error) from None


def unwritable(folder: Path, error: OSError) -> UserError:
    """Says that the cache cannot be written, and why."""
    return UserError(
        f"the cache folder {str(folder)!r} cannot be written: {error.strerror or error}"
    )
