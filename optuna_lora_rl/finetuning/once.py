"""What is made once and kept on disk: tokens, the untuned evaluation, the reference run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from datasets import load_from_disk

from optuna_lora_rl.errors import UserError


def once(
    folder: Path | None,
    kind: str,
    facts: Mapping[str, Any],
    measure: Callable[[], dict[str, float]],
) -> dict[str, float]:
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
    try:
        saved: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Absent, or not what was written: measured (again).
        saved = measure()
        _write(path, saved)
    return saved


def datasets_once(
    folder: Path | None,
    kind: str,
    facts: Mapping[str, Any],
    make: Callable[[], DatasetDict],
) -> DatasetDict:
    """Returns data sets from disk, or makes and keeps them; as ``once`` does with numbers."""
    if folder is None:
        return make()
    path = folder / kind / digest(json.dumps(dict(facts), sort_keys=True))
    saved = _saved(path)
    if saved is None:
        made = make()
        _save(made, path)
        # Read back, so that what was just made is used in the form that later processes see.
        saved = _saved(path) or made
    return saved


def _saved(path: Path) -> DatasetDict | None:
    try:
        found = load_from_disk(str(path))
    except Exception:
        # Absent or damaged; Arrow raises many kinds of errors on what it did not write.
        return None
    return found if isinstance(found, DatasetDict) else None


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write(path: Path, values: dict[str, float]) -> None:
    # Through another file, so that a killed process leaves all or nothing.
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(values), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _save(made: DatasetDict, path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        made.save_to_disk(str(unfinished))
        # A damaged folder goes; one that another process has just finished may stay.
        if _saved(path) is None:
            shutil.rmtree(path, ignore_errors=True)
            try:
                unfinished.rename(path)
            except OSError:
                if _saved(path) is None:
                    raise
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache folder {str(path.parent)!r} cannot be written: {error.strerror or error}"
    )
