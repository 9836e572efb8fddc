"""What is made or measured once and kept on disk, under a digest of all that it was made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from uuid import uuid4

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


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
    saved = _read_values(path)
    if saved is None:
        saved = measure()
        _write_values(path, saved)
    return saved


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_values(path: Path) -> dict[str, Any] | None:
    """What was written, or None where nothing was or it has changed since."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != {"values", "sum"}:
        return None
    is_intact = entry["sum"] == digest(json.dumps(entry["values"]))
    return entry["values"] if is_intact else None


def _write_values(path: Path, values: dict[str, Any]) -> None:
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


# In an entry: the digest of each of its files. Written last.
_SUMS = "sums.json"


def kept(
    folder: Path | None, facts: Mapping[str, Any], make: Callable[[], dict[str, Dataset]]
) -> dict[str, Dataset]:
    """Returns data sets from disk, or makes them and keeps them.

    Args:
        folder: Where to keep them, each entry a folder; None for nowhere.
        facts: All that they depend on; other facts, another entry.
        make: Makes them, by name.

    Raises:
        UserError: When the folder cannot be written.
    """
    if folder is None:
        return make()
    from datasets import DatasetDict

    entry = folder / digest(json.dumps(dict(facts), sort_keys=True, default=str))
    if _intact(entry):
        return dict(DatasetDict.load_from_disk(entry))
    made = make()
    _write_data(entry, made)
    return made


def _intact(entry: Path) -> bool:
    # By content: a stream that was cut between two batches reads as a shorter data set.
    try:
        expected = json.loads((entry / _SUMS).read_bytes())
        return expected == {name: _sum(entry / name) for name in _files(entry) if name != _SUMS}
    except (OSError, ValueError, RecursionError):
        return False


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def _write_data(entry: Path, made: dict[str, Dataset]) -> None:
    from datasets import DatasetDict

    # In a folder of its own, renamed at the end, so that a killed process leaves all or nothing.
    unfinished = entry.with_name(f"{entry.name}.{uuid4().hex}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        DatasetDict(made).save_to_disk(unfinished)
        sums = {name: _sum(unfinished / name) for name in _files(unfinished)}
        (unfinished / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        if not _intact(entry):
            shutil.rmtree(entry, ignore_errors=True)
            _move(unfinished, entry)
    except OSError as error:
        raise unwritable(entry.parent, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.replace(entry)
    except OSError as error:
        # A folder in the way is the entry of another process, which was faster.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
