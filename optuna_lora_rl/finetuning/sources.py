"""Reading examples from built-in tasks, files, folders and the hub."""

from __future__ import annotations

import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import files
from optuna_lora_rl.finetuning.files import Row
from optuna_lora_rl.real import PREFIXES

TINY = "tiny:"
# Data by a task's name, in three splits: the built-in tasks, and those made from packages.
_TASKS = (TINY, *PREFIXES)
# Splits that are not trained on, and what else files of theirs are called.
SPLIT_NAMES = {"validation": ("valid", "val", "dev", "eval"), "test": ()}
# What the hub keeps beside data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json")
_FORMATS = f"{', '.join(files.FORMATS)} (or one of the first four with .gz, .bz2 or .zst)"


def read(
    source: str, *, key: str, split: str, subset: str | None = None, limit: int | None = None
) -> list[Row]:
    """Reads the rows of one split.

    Args:
        source: ``tiny:<task>``, ``real:<task>``, ``reasoning_gym:<generator>``, a file, a folder,
            or a data set name on the hub.
        key: The option that named the source, for error messages.
        split: Split of a folder, a built-in task or a hub data set.
        subset: Configuration name of a hub data set, or of a local one in its form.
        limit: How many rows are wanted; all of them if left out.

    Raises:
        UserError: When there is no such data, it cannot be read, or it is empty.
    """
    rows = _read(source, key, split, subset, limit)
    if not rows:
        raise UserError(f"{key}: {source!r} has no example in its split {split!r}")
    return rows[:limit]


def local(source: str) -> Path:
    """Returns the path that a source would have here; ``~nobody`` as it stands."""
    with suppress(RuntimeError):
        return Path(source).expanduser()
    return Path(source)


def is_file(source: str) -> bool:
    """Whether a source is one file, which has no splits."""
    path = local(source)
    return files.format_of(path) is not None and not path.is_dir()


def is_hub(source: str) -> bool:
    """Whether a source is a name on the hub, which says nothing before it is fetched."""
    here = source.startswith(_TASKS) or is_file(source) or local(source).is_dir()
    return not here and not _is_path(source)


def brings(source: str, name: str, subset: str | None = None) -> bool:
    """Whether a source comes with a validation or test split of its own.

    Args:
        source: As in ``read``; of a hub data set nobody knows without fetching it.
        name: ``"validation"`` or ``"test"``.
        subset: Configuration name of a hub data set.
    """
    if source.startswith(_TASKS):
        return True
    path = local(source)
    if not path.is_dir():
        return False
    if _is_saved(path):
        splits = path / "dataset_dict.json"
        return splits.exists() and f'"{name}"' in splits.read_text(encoding="utf-8")
    declared = _declared(path, subset)
    if declared is not None:
        return name in declared
    return bool(_of_split(_files(path, subset), name))


def files_of(source: str, *, key: str, split: str, subset: str | None = None) -> list[Path]:
    """The local files that ``read`` reads, each with what it says; none of a data set elsewhere.

    Args:
        source: As in ``read``, and so the others.
        key: The option that named the source, for error messages.
        split: Split of a folder.
        subset: Configuration name.

    Raises:
        UserError: When a folder lacks the split.
    """
    path = Path(source).expanduser()
    if source.startswith(TINY) or not path.exists():
        return []
    if not path.is_dir():
        return [path]
    return _saved_files(path, split) if _is_saved(path) else _of_folder(path, key, split, subset)


def _read(source: str, key: str, split: str, subset: str | None, limit: int | None) -> list[Row]:
    if source.startswith(TINY):
        from optuna_lora_rl import tiny

        return list(tiny.load(source.removeprefix(TINY), split))
    if source.startswith(PREFIXES):
        from optuna_lora_rl import real

        try:
            return list(real.load(source, split))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    path = local(source)
    if is_file(source):
        if not path.exists():
            raise UserError(f"{key}: there is no file {source!r}")
        return files.read(path, key, limit)
    if path.is_dir():
        return _read_folder(path, key, split, subset, limit)
    if path.is_file():
        raise UserError(f"{key}: {source!r} is no data file; one ends in {_FORMATS}")
    if _is_path(source):
        raise UserError(f"{key}: there is no folder {source!r} and no file ending in {_FORMATS}")
    return _read_hub(source, key, split, subset, limit)


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _read_folder(
    path: Path, key: str, split: str, subset: str | None, limit: int | None
) -> list[Row]:
    if _is_saved(path):
        return _read_saved(path, key, split, limit)
    rows: list[Row] = []
    for file in _of_folder(path, key, split, subset):
        rows += files.read(file, key, limit)
        if limit is not None and len(rows) >= limit:
            break
    return rows


def _of_folder(path: Path, key: str, split: str, subset: str | None) -> list[Path]:
    declared = _declared(path, subset, key)
    if declared is None:
        return _named(path, key, split, subset)
    named, names = declared.get(split, []), ", ".join(declared)
    if not named:
        raise UserError(f"{key}: the folder {str(path)!r} has no split {split!r}; it has {names}")
    return named


def _named(path: Path, key: str, split: str, subset: str | None) -> list[Path]:
    found = _files(path, subset)
    if not found:
        raise UserError(f"{key}: the folder {str(path)!r} holds no file ending in {_FORMATS}")
    named = _of_split(found, split)
    if not named and split == "train":
        # A folder of one split needs no names.
        others = {file for other in SPLIT_NAMES for file in _of_split(found, other, every=True)}
        named = [file for file in found if file not in others]
    if not named:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"{key}: the folder {str(path)!r} has no file for the split {split!r}, only {names}"
        )
    return named


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
        if files.format_of(file) and file.name not in _NO_DATA and file.is_file()
    )


def _declared(path: Path, subset: str | None, key: str = "") -> dict[str, list[Path]] | None:
    """Files by split, where a folder's card names them or folders of its own hold them.

    None where the files lie at its top, under their splits' names.
    """
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    is_carded = text.startswith("---") and "\nconfigs:" in text.split("\n---")[0]
    if not is_carded and _files(path, subset):
        return None
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(path), subset).config.data_files or {}
    except (OSError, ValueError) as error:
        # Also what datasets says where it finds no data.
        if not is_carded:
            return None
        raise UserError(
            f"{key or 'data'}: the folder {str(path)!r} cannot be read: {first_line(error)}"
        ) from None
    read = {
        str(split): [Path(name) for name in names if files.format_of(Path(name))]
        for split, names in found.items()
    }
    return {split: paths for split, paths in read.items() if paths} or None


def _of_split(among: Sequence[Path], split: str, *, every: bool = False) -> list[Path]:
    """Picks the files of a split under the first of its names that any file bears, or under all.

    ``train.jsonl``, ``train-00000-of-00002.parquet`` and ``train_2.csv`` are all of ``train``.
    """
    found: list[Path] = []
    for name in (split, *SPLIT_NAMES.get(split, ())):
        if every or not found:
            found += [
                file for file in among if re.fullmatch(rf"{re.escape(name)}([-_.].*)?", file.stem)
            ]
    return found


def _saved_files(path: Path, split: str) -> list[Path]:
    folder = path / split if (path / "dataset_dict.json").exists() else path
    state = folder / "state.json"
    if not state.is_file():
        return []
    # Beside them datasets keeps what it computed from them.
    parts = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return [folder / part["filename"] for part in parts]


def _read_saved(path: Path, key: str, split: str, limit: int | None) -> list[Row]:
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
    return _rows(saved, limit)


def _read_hub(
    source: str, key: str, split: str, subset: str | None, limit: int | None
) -> list[Row]:
    from datasets import load_dataset

    try:
        with no_waiting():
            return _rows(load_dataset(source, subset, split=split), limit)
    except Exception as error:
        raise UserError(f"{key}: {failure('data set', source, error)}") from None


def _rows(table: Any, limit: int | None) -> list[Row]:
    return [files.from_table(row) for row in islice(table, limit)]


_TIMEOUT_SECONDS = 5
_OFFLINE = ("offline", "connect", "resolve", "timeout", "maxretry")
_MISSING = ("RepositoryNotFound", "DatasetNotFound", "404", "is not a valid model")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Puts the libraries into offline mode, for the block, where the hub cannot be reached.

    They then take what is in their cache, or fail at once instead of after a minute of retries.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _is_reachable(constants.ENDPOINT):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def failure(kind: str, name: str, error: Exception) -> str:
    """Says in one sentence why something could not be had from the hub.

    Args:
        kind: ``"model"`` or ``"data set"``.
        name: What was asked for.
        error: What huggingface_hub, datasets or transformers raised.
    """
    chain = " ".join(f"{type(link).__name__} {link}" for link in _chain(error))
    if "GatedRepo" in chain or "gated repo" in chain:
        return f"the {kind} {name!r} is gated; accept its terms on the hub, then hf auth login"
    missing = any(word in chain for word in _MISSING)
    if any(word in chain.lower() for word in _OFFLINE) and not missing:
        return (
            f"{name!r} is no local file or folder, and the {kind} cannot be fetched from the hub: "
            "there is no connection"
        )
    if missing:
        return f"there is no {kind} {name!r}, neither here nor on the hub"
    return f"the {kind} {name!r} cannot be loaded: {first_line(error)}"


def _is_reachable(endpoint: str) -> bool:
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies():
        # Behind a proxy only the libraries' own clients can tell.
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), _TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
