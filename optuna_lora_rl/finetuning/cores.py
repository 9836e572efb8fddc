"""Runs on one machine share its cores.

Two processes that each compute with as many threads as there are cores do not take twice as long,
but five times (measured on two cores): threads wait for others that have no core. So every run
takes the cores divided by the runs, also when one joins or leaves on the way.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from filelock import FileLock
from filelock import Timeout

from optuna_lora_rl import user_cache

# Seconds from one look at the others to the next.
_EVERY = 5.0


class Cores:
    """A run's share of the cores, from ``with`` to its end.

    A run is known to the others by a file that it keeps locked, which a killed process does not.

    Args:
        most: Threads that are of use to the run; None for as many as torch takes.
        says: Told in a sentence when the share changes.
    """

    def __init__(self, most: int | None, says: Callable[[str], None]) -> None:
        self._most = most
        self._says = says
        # Per machine: a home may be on several.
        self._folder = user_cache.folder("runs") / socket.gethostname()
        self._own = FileLock(self._folder / f"{uuid.uuid4().hex}.run")
        self._looked = 0.0

    def __enter__(self) -> Cores:
        self._before = torch.get_num_threads()
        self._runs = 1
        # Without a place for files every run is the only one.
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._turn():
                self._own.acquire()
        self._take(self._count())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.set_num_threads(self._before)
        with suppress(OSError):
            Path(self._own.lock_file).unlink(missing_ok=True)
            self._own.release()

    def settle(self) -> None:
        """Takes more or fewer threads where other runs ended or began; called often."""
        if time.monotonic() - self._looked < _EVERY:
            return
        runs = self._count()
        if runs == self._runs:
            return
        self._take(runs)
        others = {1: "no other run", 2: "another run"}.get(runs, f"{runs - 1} other runs")
        threads = torch.get_num_threads()
        self._says(
            f"{others} on this machine: {threads} thread{'' if threads == 1 else 's'} from now on"
        )

    def _take(self, runs: int) -> None:
        self._runs = runs
        # Whoever sets the number wants it.
        if "OMP_NUM_THREADS" not in os.environ or self._most is not None:
            share = max(1, self._before // runs)
            torch.set_num_threads(share if self._most is None else min(self._most, share))

    def _count(self) -> int:
        self._looked = time.monotonic()
        alive = 1
        with suppress(OSError), self._turn():
            for path in self._folder.glob("*.run"):
                if str(path) == self._own.lock_file:
                    continue
                other = FileLock(path)
                try:
                    other.acquire(timeout=0)
                except Timeout:
                    alive += 1
                else:
                    path.unlink(missing_ok=True)
                    other.release()
        return alive

    def _turn(self) -> FileLock:
        # So that none is looked at between the making of its file and its locking.
        return FileLock(self._folder / "turn.lock")
