"""Reading the rows of one file, whatever its format and compression."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from typing import TextIO

from optuna_lora_rl.errors import UserError

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Around any of the formats but Parquet, which compresses itself.
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def format_of(path: Path) -> str | None:
    """Returns a file's format by its name, without its compression; None where it is no data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read(path: Path, key: str, limit: int | None = None) -> list[Row]:
    """Reads the rows of a file, in its order.

    Args:
        path: The file.
        key: The option that named it, for messages.
        limit: How many rows are wanted; all of them if left out.

    Raises:
        UserError: When it cannot be read.
    """
    readers: dict[str | None, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _tsv,
        ".parquet": _parquet,
    }
    try:
        return list(islice(readers[format_of(path)](path), limit))
    except RecursionError:
        raise UserError(f"{key}: {str(path)!r} cannot be read: it is nested too deeply") from None
    except (OSError, EOFError, ValueError, csv.Error) as error:
        # Also pyarrow's errors and those of decoding: they are ValueErrors and OSErrors.
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{key}: {str(path)!r} cannot be read: {lines[0]}") from None


def from_table(row: Row) -> Row:
    """Takes out of a table's nested cells what the table filled in.

    All structures of a column have the same fields there: those that a row had not are null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _opened(path: Path, newline: str | None = None) -> TextIO:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open(encoding="utf-8-sig", newline=newline)
    import pyarrow

    return io.TextIOWrapper(
        pyarrow.input_stream(str(path), compression=compression),
        encoding="utf-8-sig",
        newline=newline,
    )


def _json_lines(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(line, f"line {number}")


def _json(path: Path) -> Iterable[Row]:
    with _opened(path) as content:
        text = content.read()
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


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with _opened(path, newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        names = list(reader.fieldnames or ())
        twice = [name for name in names if name and names.count(name) > 1]
        if twice:
            raise ValueError(f"its head names {twice[0]!r} more than once")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"line {reader.line_num} has more cells than there are columns; a cell with "
                    "a delimiter in it needs quotes"
                )
            yield row


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, delimiter="\t")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from map(from_table, batch.to_pylist())
