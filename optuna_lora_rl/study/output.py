"""The output folder: whose it is, one writer at a time, and files that are whole or not there."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from filelock import Timeout

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked

BEST_FILE = "best.json"
_OWNER = ".study"
_LOCK = ".lock"
# Where files and folders are made before they take their place.
_UNFINISHED = ".unfinished"
# What earlier versions left of a best adapter when they were killed.
_FORMER_UNFINISHED = re.compile(r"\.best-\d+")
# Seconds. Long enough for any copy of an adapter; a worker that was stopped may hold the lock.
_PATIENCE = 120


def check(output: Path, name: str, database: Path | None) -> None:
    """Checks that the folder is the study's or may become it; creates nothing.

    A study overwrites and deletes adapters and reports in its folder, so that the folder must
    hold nothing of anybody else. Hidden files, such as .gitignore, may lie there; a study
    touches no hidden file but its own.

    Args:
        output: The folder.
        name: The study's name.
        database: The SQLite file of the study, which may lie in the folder.

    Raises:
        UserError: When the folder holds anything else, is another study's, or cannot be read.
    """
    try:
        # Listed before the owner is read: what lies there without an owner is no worker's of ours.
        there = sorted(output.iterdir()) if output.is_dir() else []
        owner = _owner(output)
    except OSError as error:
        raise UserError(f"output is {str(output)!r}, but cannot be read: {error}") from error
    strangers = [] if owner else [path.name for path in there if _is_strange(path, database)]
    if strangers:
        raise UserError(
            f"output is {str(output)!r}, which is not empty and holds no study (it holds "
            f"{', '.join(strangers[:3])}{', ...' if strangers[3:] else ''}): a study deletes "
            "and overwrites files in its folder; choose a new or an empty one"
        )
    if owner not in ("", name):
        raise UserError(
            f"output is {str(output)!r}, which holds the adapters of the study {owner!r}; give "
            f"{name!r} a folder of its own"
        )
    check_best(output)


def claim(output: Path, name: str, database: Path | None) -> None:
    """Makes the folder the study's, or checks that it is.

    Args:
        output: The folder.
        name: The study's name.
        database: The SQLite file of the study, which may lie in the folder.

    Raises:
        UserError: As ``check``, or when the folder cannot be written.
    """
    check(output, name, database)
    try:
        _make(output)
        with lock(output):
            owner = _owner(output)
            if not owner:
                write(output / _OWNER, name)
            elif owner == name:
                _tidy(output)
    except OSError as error:
        raise UserError(f"output is {str(output)!r}, but cannot be written: {error}") from error
    # Another study may have come first.
    check(output, name, database)


def check_best(output: Path) -> None:
    """Raises ``UserError`` when ``best`` in the folder is nothing that a study made."""
    best = output / "best"
    kind = "a link" if best.is_symlink() else "a folder" if best.is_dir() else "a file"
    made = kind == "a folder" and (best / BEST_FILE).is_file()
    if (best.exists() or best.is_symlink()) and not made:
        raise UserError(
            f"{best} is {kind} that no study made, and the best adapter goes there; move it away, "
            "or choose another output folder"
        )


def holds_adapters(output: Path, name: str) -> bool:
    """Whether the folder is the study's and an adapter lies there."""
    return _owner(output) == name and (
        (output / "best").exists() or any((output / "adapters").glob("*"))
    )


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Keeps other workers on the folder waiting; the same thread may take it again inside.

    Raises:
        UserError: When another process keeps it for minutes.
    """
    try:
        with FileLock(output / _LOCK, timeout=_PATIENCE, is_singleton=True):
            yield
    except Timeout:
        raise UserError(
            f"another process has been writing in {str(output)!r} for {_PATIENCE} seconds; if it "
            "was stopped (Ctrl-Z), let it go on or end it, and run the same command again"
        ) from None


@contextmanager
def place(target: Path, output: Path | None = None) -> Iterator[Path]:
    """Gives the path at which to make a file or a folder; then it takes the target's place.

    So there is the former one or the new one, and never a half of either.

    Args:
        target: What is replaced, in an output folder.
        output: That folder, where the target does not lie directly in it.
    """
    folder = output or target.parent
    with lock(folder):
        workshop = _tidy(folder)
        workshop.mkdir()
        try:
            yield workshop / target.name
            if target.is_dir():
                # A folder takes no other's place that holds anything.
                target.rename(workshop / "former")
            (workshop / target.name).replace(target)
        finally:
            _tidy(folder)


def write(file: Path, text: str, output: Path | None = None) -> None:
    """Writes a file of an output folder, all or nothing; as for :func:`place`."""
    with place(file, output) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: the folder {output} cannot be created ({error.strerror}); choose another "
            "output folder"
        ) from error


def _tidy(output: Path) -> Path:
    """Deletes what killed processes left unfinished; the lock must be held."""
    for path in output.iterdir():
        if path.name == _UNFINISHED or _FORMER_UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return output / _UNFINISHED


def _owner(output: Path) -> str:
    file = output / _OWNER
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _is_strange(path: Path, database: Path | None) -> bool:
    if path.name.startswith(".") and not path.is_dir():
        return False
    # SQLite keeps a journal and the like beside its file while it is in use.
    return database is None or not path.absolute().as_posix().startswith(
        database.absolute().as_posix()
    )


LOG_FILE = "log.txt"


@contextmanager
def logged(folder: Path, says: Callable[[str], None] | None = None) -> Iterator[None]:
    """Appends what the package logs to ``log.txt``: changes of ranks, and notes of packs.

    Args:
        folder: The study's; made at the first line.
        says: Shows a warning, too.
    """
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    file = _File(folder / LOG_FILE, encoding="utf-8", delay=True)
    file.setFormatter(_Masked("%(asctime)s %(message)s"))
    handlers: list[logging.Handler] = [file]
    if says is not None:
        handlers.append(_Shown(says))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _Shown(logging.Handler):
    """Shows warnings."""

    def __init__(self, says: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._says = says

    def emit(self, record: logging.LogRecord) -> None:
        self._says(masked(record.getMessage()))


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _File(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        # A full disk ends the study by its results, which matter, and not by this file.
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass
