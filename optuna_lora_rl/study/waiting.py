"""What a person sees while something takes its time: a bar on a terminal, a line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from rich.console import Console

# Seconds after which a wait is worth a line, and those from one line to the next.
_FIRST, _EVERY = 2.0, 30.0


class Ticker:
    """Calls a function again and again in a thread of its own.

    Args:
        every: Seconds from one call to the next.
        call: The function.
    """

    def __init__(self, every: float, call: Callable[[], None]) -> None:
        self._every, self._call = every, call
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the calls; none is under way when it returns."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            self._call()


class WaitingLines:
    """Writes a line when an activity has lasted for two seconds, and then every half minute.

    Args:
        write: Writes one line.
        first: Seconds of an activity before its first line.
        every: Seconds of silence before each further one.
    """

    def __init__(
        self, write: Callable[[str], None], *, first: float = _FIRST, every: float = _EVERY
    ) -> None:
        self._write, self._first, self._every = write, first, every
        self._lock = threading.Lock()
        self._activity: Activity | None = None
        self._shown = False
        self._began = self._written = time.monotonic()
        self._ticker = Ticker(min(first, every, _FIRST) / 4, self._tick)

    def start(self) -> None:
        self._ticker.start()

    def stop(self) -> None:
        self._ticker.stop()

    def works_on(self, activity: Activity | None, *, first: bool = True) -> None:
        """Takes what is being done now.

        Args:
            activity: What; None for nothing worth a line.
            first: Whether it is worth a line before there was silence for long.
        """
        with self._lock:
            before = None if self._activity is None else self._activity.what
            if activity is not None and activity.what != before:
                self._began, self._shown = time.monotonic(), not first
            self._activity = activity

    def write(self, line: str) -> None:
        """Writes another line, after which there is silence again."""
        with self._lock:
            self._write(line)
            self._written = time.monotonic()

    def _tick(self) -> None:
        with self._lock:
            activity, now = self._activity, time.monotonic()
            if activity is None or now - self._began < self._first:
                return
            if self._shown and now - self._written < self._every:
                return
            self._shown, self._written = True, now
            self._write(f"{wording.activity(activity)} ({wording.duration(now - self._began)})")


@contextmanager
def waiting(console: Console) -> Iterator[OnActivity]:
    """Shows what a command is doing: one line that moves on a terminal.

    Elsewhere there is a line every half minute: a log of a command that takes seconds has none.

    Args:
        console: Standard error, so that standard output holds the command's result alone.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        with _bar(console) as show:
            yield show
        return
    lines = WaitingLines(lambda line: console.print(line, soft_wrap=True), first=_EVERY)
    lines.start()
    try:
        yield lines.works_on
    finally:
        lines.stop()


@contextmanager
def _bar(console: Console) -> Iterator[OnActivity]:
    from rich.progress import BarColumn
    from rich.progress import Progress
    from rich.progress import SpinnerColumn
    from rich.progress import Task
    from rich.progress import TextColumn
    from rich.progress import TimeElapsedColumn
    from rich.progress import TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            left = super().render(task)
            return Text.assemble(left, " left") if task.time_remaining else Text()

    columns = (
        SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
        TextColumn("{task.fields[said]}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TimeLeft(table_column=Column(no_wrap=True)),
    )
    # What a terminal shows is written above the bar; what goes to a file goes there.
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    ) as progress:
        # Shown from the first activity on.
        task = progress.add_task("", total=None, visible=False, said="")
        last = ""

        def show(activity: Activity) -> None:
            nonlocal last
            if activity.what != last:
                last = activity.what
                progress.reset(task, total=activity.total, visible=True)
            progress.update(
                task,
                total=activity.total,
                completed=activity.done,
                said=wording.activity(activity),
            )

        yield show
