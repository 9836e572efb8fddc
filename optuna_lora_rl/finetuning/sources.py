"""Reading examples from built-in tasks, files, folders and the hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import hub

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TINY = "tiny:"
# Splits that are not trained on, and what else files of theirs are called.
SPLIT_NAMES = {"validation": ("valid", "val", "dev", "eval"), "test": ()}
# What the hub keeps beside data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json")


def read(source: str, *, key: str, split: str, subset: str | None = None) -> list[Row]:
    """Reads all rows of one split.

    Args:
        source: ``tiny:<task>``, a file, a folder, or a data set name on the hub.
        key: The option that named the source, for error messages.
        split: Split of a folder, a built-in task or a hub data set.
        subset: Configuration name of a hub data set, or the folder of its name in a clone.

    Raises:
        UserError: When there is no such data, it cannot be read, or it is empty.
    """
    rows = _read(source, key, split, subset)
    if not rows:
        raise UserError(f"{key}: {source!r} has no example in its split {split!r}")
    return rows


def is_file(source: str) -> bool:
    """Whether a source is one file, which has no splits."""
    return Path(source).suffix.lower() in SUFFIXES and not Path(source).expanduser().is_dir()


def brings(source: str, name: str, subset: str | None = None) -> bool:
    """Whether a source comes with a validation or test split of its own.

    Args:
        source: As in ``read``; of a hub data set nobody knows without fetching it.
        name: ``"validation"`` or ``"test"``.
        subset: Configuration name of a hub data set.
    """
    if source.startswith(TINY):
        return True
    path = Path(source).expanduser()
    if not path.is_dir():
        return False
    if _is_saved(path):
        splits = path / "dataset_dict.json"
        return splits.exists() and f'"{name}"' in splits.read_text(encoding="utf-8")
    return bool(_of_split(_files(path, subset), name))


def _read(source: str, key: str, split: str, subset: str | None) -> list[Row]:
    if source.startswith(TINY):
        from optuna_lora_rl import tiny

        return list(tiny.load(source.removeprefix(TINY), split))
    path = Path(source).expanduser()
    if is_file(source):
        if not path.exists():
            raise UserError(f"{key}: there is no file {source!r}")
        return _read_file(path, key)
    if path.is_dir():
        return _read_folder(path, key, split, subset)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"{key}: there is no folder {source!r} and no file ending in {kinds}")
    return _read_hub(source, key, split, subset)


def _read_file(path: Path, key: str) -> list[Row]:
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    try:
        return list(readers[path.suffix.lower()](path))
    except RecursionError:
        raise UserError(f"{key}: {str(path)!r} cannot be read: it is nested too deeply") from None
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        # Also pyarrow's errors: they are ValueErrors and OSErrors.
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {str(path)!r} cannot be read: {reason}") from None


def _json_lines(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(line, f"line {number}")


def _json(path: Path) -> Iterable[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        # Many .json data files hold one object a line.
        if "\n" in text.strip() and text.lstrip().startswith("{"):
            return list(_json_lines(path))
        raise ValueError(f"it is no JSON: {error}") from None
    if isinstance(rows, dict):
        tables = [value for value in rows.values() if isinstance(value, list)]
        rows = tables[0] if len(tables) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of objects")
    return rows


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    return row


def _csv(path: Path) -> Iterable[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _parquet(path: Path) -> Iterable[Row]:
    import pyarrow.parquet

    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _read_folder(path: Path, key: str, split: str, subset: str | None) -> list[Row]:
    if _is_saved(path):
        return _read_saved(path, key, split)
    files = _files(path, subset)
    if not files:
        raise UserError(
            f"{key}: the folder {str(path)!r} holds no file ending in {', '.join(SUFFIXES)}"
        )
    named = _of_split(files, split)
    if not named and split == "train":
        # A folder of one split needs no names.
        others = {file for other in SPLIT_NAMES for file in _of_split(files, other, every=True)}
        named = [file for file in files if file not in others]
    if not named:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{key}: the folder {str(path)!r} has no file for the split {split!r}, only {names}"
        )
    return [row for file in named for row in _read_file(file, key)]


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _files(path: Path, subset: str | None) -> list[Path]:
    # A clone from the hub keeps its data in data/, and its subsets in folders of their names.
    root = path / subset if subset is not None and (path / subset).is_dir() else path
    return sorted(
        file
        for folder in (root, root / "data")
        if folder.is_dir()
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and file.name not in _NO_DATA and file.is_file()
    )


def _of_split(files: Sequence[Path], split: str, *, every: bool = False) -> list[Path]:
    """Picks the files of a split under the first of its names that any file bears, or under all.

    ``train.jsonl``, ``train-00000-of-00002.parquet`` and ``train_2.csv`` are all of ``train``.
    """
    found: list[Path] = []
    for name in (split, *SPLIT_NAMES.get(split, ())):
        if every or not found:
            found += [
                file for file in files if re.fullmatch(rf"{re.escape(name)}([-_.].*)?", file.stem)
            ]
    return found


def _read_saved(path: Path, key: str, split: str) -> list[Row]:
    from datasets import DatasetDict
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {error}") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(
                f"{key}: {str(path)!r} has no split {split!r}; it has {', '.join(saved)}"
            )
        saved = saved[split]
    return list(saved)


def _read_hub(source: str, key: str, split: str, subset: str | None) -> list[Row]:
    from datasets import load_dataset

    try:
        with hub.no_waiting():
            return list(load_dataset(source, subset, split=split))
    except Exception as error:
        raise UserError(f"{key}: {hub.failure('data set', source, error)}") from None
