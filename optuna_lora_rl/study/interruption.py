"""Ctrl-C and SIGTERM: end cleanly after telling the trial; the second time, end at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130


class Interruption:
    """Turns signals into ``KeyboardInterrupt``, in training only, never in a database's write.

    Elsewhere a signal is remembered, and raised when the next window opens. Outside the main
    thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._open = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def window(self) -> Iterator[None]:
        """Inside, a signal raises ``KeyboardInterrupt`` at once."""
        with self._set(open_=True):
            self._raise_if_requested()
            yield

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Inside, a signal waits; it is raised at the end."""
        with self._set(open_=False):
            yield
        if self._open:
            self._raise_if_requested()

    @contextmanager
    def _set(self, *, open_: bool) -> Iterator[None]:
        before, self._open = self._open, open_
        try:
            yield
        finally:
            self._open = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(EXIT_CODE)
        self.requested = True
        self._raise_if_requested(only_if=self._open)

    def _raise_if_requested(self, *, only_if: bool = True) -> None:
        if self.requested and only_if:
            raise KeyboardInterrupt
