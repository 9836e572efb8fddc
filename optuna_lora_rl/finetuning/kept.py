"""Tokenised splits kept on disk, under a digest of all that they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset
from datasets import DatasetDict

from optuna_lora_rl.finetuning.once import digest
from optuna_lora_rl.finetuning.once import unwritable

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
    entry = folder / digest(json.dumps(dict(facts), sort_keys=True, default=str))
    if _intact(entry):
        return dict(DatasetDict.load_from_disk(entry))
    made = make()
    _write(entry, made)
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


def _write(entry: Path, made: dict[str, Dataset]) -> None:
    # In a folder of its own, renamed at the end, so that a killed process leaves all or nothing.
    unfinished = entry.with_name(f"{entry.name}.{uuid4().hex}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        DatasetDict(made).save_to_disk(unfinished)
        sums = {name: _sum(unfinished / name) for name in _files(unfinished)}
        (unfinished / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        if not _intact(entry):
            shutil.rmtree(entry, ignore_errors=True)
            _rename(unfinished, entry)
    except OSError as error:
        raise unwritable(entry.parent, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _rename(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.replace(entry)
    except OSError as error:
        # A folder in the way is the entry of another process, which was faster.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
