"""What a study decides while it runs, line by line in a file beside its results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "log.txt"


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Appends what the package logs to ``log.txt``: changes of ranks, and notes of packs.

    Args:
        folder: The study's; made at the first line.
    """
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    handler = _File(folder / FILE, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()


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
