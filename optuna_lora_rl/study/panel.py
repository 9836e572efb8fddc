"""The live panel of a running study, redrawn in place on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import redirect_stderr
from contextlib import redirect_stdout
from typing import IO
from typing import TYPE_CHECKING
from typing import Any

from rich.console import Console
from rich.console import Group
from rich.console import RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.study import display
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.display import Display
from optuna_lora_rl.study.display import LineDisplay
from optuna_lora_rl.study.display import RunningTrial
from optuna_lora_rl.study.display import RunningTrials
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.waiting import Ticker

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec

# Lines of the panel beside those of the running trials.
_OTHER_LINES = 9
# Seconds from one drawing to the next.
_REDRAWN = 0.25


class _InTurn(FileProxy):
    """What others write, a line at a time above the panel, never while it is drawn."""

    def __init__(self, console: Console, file: IO[str], turn: threading.RLock) -> None:
        super().__init__(console, file)
        self._turn = turn

    def write(self, text: str) -> int:
        with self._turn:
            return super().write(text)

    def flush(self) -> None:
        with self._turn:
            super().flush()


class LiveDisplay(Display):
    """A calm panel that is redrawn in place, with one line for every finished trial above it.

    rich works out where to draw before it writes, so a line printed between the two would be
    erased: whoever writes or draws here does so in turn.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spec: StudySpec | None = None
        self._trials: Sequence[FrozenTrial] = ()
        self._tuned: Sequence[str] = ()
        self._doing = Activity("")
        self._running = RunningTrials()
        self._opened = time.monotonic()
        self._share_before = 0.0
        self._turn = threading.RLock()
        self._ticker = Ticker(_REDRAWN, self._redraw)
        self._redirected = ExitStack()
        # Last: it renders at once.
        self._live = Live(
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
            get_renderable=self._render,
        )

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        self._spec, self._trials = spec, trials
        self._tuned = list(spec.lora_space().distributions())
        self._opened = time.monotonic()
        self._share_before = Usage.of(trials).share(spec.budget)
        self._console.print()
        self._live.start()
        self._ticker.start()
        # What a library prints would otherwise be written into the panel.
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream.isatty():
                proxy = _InTurn(self._console, stream, self._turn)
                self._redirected.enter_context(redirect(proxy))
        done = Usage.of(trials).trials
        if done:
            self.says(f"going on after {display.counted_trials(done)}")

    def works_on(self, activity: Activity) -> None:
        self._doing = activity

    def trial_starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        self._running.starts(number, configuration)

    def trial_works_on(self, number: int, activity: Activity) -> None:
        self._running.by_number[number].activity = activity

    def evaluated(
        self, number: int, evaluation: int, score: float, metrics: Mapping[str, float]
    ) -> None:
        running = self._running.by_number[number]
        running.scores.append(score)
        running.metrics = metrics

    def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        self._trials, self._doing = trials, Activity("proposing")
        self._running.ends(trial.number)
        best = outcome.best_of(trials)
        is_best = best is not None and best.number == trial.number
        line = Text.assemble(
            (f"  {'★' if is_best else ' '} {trial.number:>3}  ", "yellow" if is_best else "dim"),
            (display.result(trial), "bold" if is_best else display.style(trial)),
            (f"  {outcome.configuration(trial)}", "" if is_best else "dim"),
        )
        with self._turn:
            self._console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def says(self, sentence: str) -> None:
        with self._turn:
            self._console.print(Text(f"  {sentence}", style="cyan"))

    def closes(self) -> None:
        self._ticker.stop()
        self._redirected.close()
        self._live.stop()

    def _redraw(self) -> None:
        with self._turn:
            self._live.refresh()

    def _render(self) -> RenderableType:
        if self._spec is None:
            return Text()
        named = self._rows()
        rows = Table.grid(padding=(0, 2))
        # Where there is little room, contents are cut and names are not.
        names = max(len(name) for name, _ in named)
        rows.add_column(style="dim", justify="right", no_wrap=True, min_width=names)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        for name, content in named:
            rows.add_row(name, content)
        return Padding(Group(self._heading(), self._bar(), rows), (1, 2, 0, 2))

    def _heading(self) -> RenderableType:
        assert self._spec is not None
        usage, limit = Usage.of(self._trials), self._spec.budget.trials
        done = display.counted_trials(usage.trials)
        done = f"{usage.trials} of {limit} trials" if limit else done
        heading = Table.grid(expand=True)
        heading.add_column(no_wrap=True, overflow="ellipsis")
        heading.add_column(justify="right", no_wrap=True)
        heading.add_row(Text(display.headline(self._spec), style="bold"), Text(done, style="bold"))
        return heading

    def _bar(self) -> RenderableType:
        assert self._spec is not None
        share = Usage.of(self._trials).share(self._spec.budget)
        if self._spec.budget.trials:
            # Running trials fill their part, evaluation by evaluation.
            evaluations = sum(len(running.scores) for running in self._running.by_number.values())
            part = evaluations / self._spec.training.evaluations
            share = min(1.0, share + part / self._spec.budget.trials)
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=1.0, completed=share, complete_style="cyan"))
        return bar

    def _rows(self) -> list[tuple[str, RenderableType]]:
        rows = self._running_rows()
        best = outcome.best_of(self._trials)
        if best is not None:
            rows.append(
                (
                    "best",
                    Text.assemble(
                        (display.brief(best), "bold green"),
                        (f"  {outcome.configuration(best)}", "dim"),
                    ),
                )
            )
            values = [
                outcome.final_score(trial) for trial in self._trials if trial.state.is_finished()
            ]
            rows.append(("scores", Text(wording.sparkline(values[-60:]), style="cyan")))
        rows.append(("time", self._time()))
        return rows

    def _running_rows(self) -> list[tuple[str, RenderableType]]:
        """Two lines for a trial alone; one line each where several run side by side."""
        running = self._running.by_number
        if not running:
            return [("", self._waiting())]
        if len(running) == 1:
            ((number, one),) = running.items()
            configuration = Text(wording.compact(one.configuration, self._tuned))
            return [(f"trial {number}", configuration), ("", self._running_scores(one))]
        room = max(2, self._console.height - _OTHER_LINES)
        shown = list(running.items())[: room if len(running) <= room else room - 1]
        rows: list[tuple[str, RenderableType]] = [
            (f"trial {number}", self._running_line(one)) for number, one in shown
        ]
        if len(shown) < len(running):
            rows.append(("", Text(f"and {len(running) - len(shown)} more", style="dim")))
        return rows

    def _waiting(self) -> RenderableType:
        doing = self._doing
        said = Text(wording.activity(doing), style="dim")
        if not doing.total:
            return said
        row = Table.grid(padding=(0, 2))
        row.add_row(said, ProgressBar(total=doing.total, completed=doing.done, width=20))
        return row

    def _running_line(self, one: RunningTrial) -> Text:
        assert self._spec is not None
        bars = wording.sparkline(one.scores).ljust(self._spec.training.evaluations, "·")
        score = wording.score(one.scores[-1] if one.scores else None)
        configuration = wording.compact(one.configuration, self._tuned)
        return Text.assemble((bars, "cyan"), f"  {score:>7}  ", (configuration, "dim"))

    def _running_scores(self, one: RunningTrial) -> Text:
        assert self._spec is not None
        total = self._spec.training.evaluations
        elapsed = wording.duration(time.monotonic() - one.started)
        parts: list[tuple[str, str]] = []
        if one.scores:
            parts = [
                (wording.sparkline(one.scores).ljust(total, "·"), "cyan"),
                (f"  score {wording.score(one.scores[-1])}  ", ""),
            ]
        return Text.assemble(*parts, (f"{elapsed}  {wording.activity(one.activity)}", "dim"))

    def _time(self) -> RenderableType:
        assert self._spec is not None
        elapsed = time.monotonic() - self._opened
        done = Usage.of(self._trials).share(self._spec.budget) - self._share_before
        left = 1.0 - self._share_before - done
        parts = [wording.duration(elapsed)]
        if done > 0 and left > 0:
            parts.append(f"about {wording.duration(elapsed / done * left)} left")
        return Text(" · ".join(parts), style="dim")


def create(console: Console, *, plain: bool = False, verbose: bool = False) -> Display:
    """Returns a live panel where ``console`` is a terminal, plain lines elsewhere.

    Args:
        console: Where to.
        plain: Lines on a terminal too.
        verbose: A line for each evaluation too, which needs plain lines.
    """
    if plain or verbose or not console.is_terminal or console.is_dumb_terminal:
        return LineDisplay(console, verbose=verbose)
    return LiveDisplay(console)
