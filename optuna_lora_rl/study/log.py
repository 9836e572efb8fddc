"""What the package logs while a study runs: a file beside its results, and warnings shown."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna_lora_rl.errors import masked

FILE = "log.txt"


@contextmanager
def kept(folder: Path, says: Callable[[str], None] | None = None) -> Iterator[None]:
    """Appends what the package logs to ``log.txt``: changes of ranks, and notes of packs.

    Args:
        folder: The study's; made at the first line.
        says: Shows a warning, too.
    """
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    file = _File(folder / FILE, encoding="utf-8", delay=True)
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
