"""What a running study shows: a live panel on a terminal, one plain line a trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.console import Group
from rich.console import RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.budget import Usage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec


# Lines of the panel beside those of the running trials.
_OTHER_LINES = 9


class Display:
    """Shows nothing; what ``tune`` uses unless asked otherwise."""

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        """The study begins or goes on, with these trials behind it."""

    def works_on(self, what: str) -> None:
        """Something other than a trial takes its time, such as loading the model."""

    def trial_starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        """A trial begins."""

    def evaluated(
        self, number: int, evaluation: int, score: float, metrics: Mapping[str, float]
    ) -> None:
        """A running trial was evaluated; ``score`` is what it would have if it ended now."""

    def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        """A trial is over; ``trials`` are all of the study."""

    def says(self, sentence: str) -> None:
        """Something that the user should know."""

    def closes(self) -> None:
        """Nothing more comes."""


class LineDisplay(Display):
    """One plain line a trial, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spec: StudySpec | None = None

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        self._spec = spec
        self._print(headline(spec))
        done = Usage.of(trials).trials
        if done:
            self._print(f"going on after {_trials(done)}")

    def works_on(self, what: str) -> None:
        self._print(what)

    def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        assert self._spec is not None
        limit = self._spec.budget.trials
        done = f"{Usage.of(trials).trials}" + (f"/{limit}" if limit else "")
        best = outcome.best_of(trials)
        seconds = wording.duration(trial.user_attrs.get("seconds", 0.0))
        self._print(
            f"trial {trial.number:>3} ({done})  {_result(trial)}  {seconds:>6}  "
            f"{outcome.configuration(trial)}" + (f"  [best {_brief(best)}]" if best else "")
        )

    def says(self, sentence: str) -> None:
        self._print(sentence)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Running:
    """What the panel knows of a running trial."""

    configuration: Mapping[str, Any]
    scores: list[float] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)


class LiveDisplay(Display):
    """A calm panel that is redrawn in place, with one line for every finished trial above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spec: StudySpec | None = None
        self._trials: Sequence[FrozenTrial] = ()
        self._tuned: Sequence[str] = ()
        self._doing = ""
        self._running: dict[int, _Running] = {}
        self._opened = time.monotonic()
        self._share_before = 0.0
        # Last: it renders at once.
        self._live = Live(
            console=console, refresh_per_second=4, transient=True, get_renderable=self._render
        )

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        self._spec, self._trials = spec, trials
        self._tuned = list(spec.lora_space().distributions())
        self._opened = time.monotonic()
        self._share_before = Usage.of(trials).share(spec.budget)
        self._console.print()
        self._live.start()
        done = Usage.of(trials).trials
        if done:
            self.says(f"going on after {_trials(done)}")

    def works_on(self, what: str) -> None:
        self._doing = what

    def trial_starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        # Another thread draws: the mapping is replaced, never changed.
        self._running = {**self._running, number: _Running(configuration)}

    def evaluated(
        self, number: int, evaluation: int, score: float, metrics: Mapping[str, float]
    ) -> None:
        running = self._running[number]
        running.scores.append(score)
        running.metrics = metrics

    def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        self._trials, self._doing = trials, "proposing"
        self._running = {n: one for n, one in self._running.items() if n != trial.number}
        best = outcome.best_of(trials)
        is_best = best is not None and best.number == trial.number
        line = Text.assemble(
            (f"  {'★' if is_best else ' '} {trial.number:>3}  ", "yellow" if is_best else "dim"),
            (_result(trial), "bold" if is_best else _style(trial)),
            (f"  {outcome.configuration(trial)}", "" if is_best else "dim"),
        )
        self._console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def says(self, sentence: str) -> None:
        self._console.print(Text(f"  {sentence}", style="cyan"))

    def closes(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        if self._spec is None:
            return Text()
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", justify="right", no_wrap=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        for name, content in self._rows():
            rows.add_row(name, content)
        return Padding(Group(self._heading(), self._bar(), rows), (1, 2, 0, 2))

    def _heading(self) -> RenderableType:
        assert self._spec is not None
        usage, limit = Usage.of(self._trials), self._spec.budget.trials
        done = f"{usage.trials} of {limit} trials" if limit else _trials(usage.trials)
        heading = Table.grid(expand=True)
        heading.add_column(no_wrap=True, overflow="ellipsis")
        heading.add_column(justify="right", no_wrap=True)
        heading.add_row(Text(headline(self._spec), style="bold"), Text(done, style="bold"))
        return heading

    def _bar(self) -> RenderableType:
        assert self._spec is not None
        share = Usage.of(self._trials).share(self._spec.budget)
        if self._spec.budget.trials:
            # Running trials fill their part, evaluation by evaluation.
            evaluations = sum(len(running.scores) for running in self._running.values())
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
                        (_brief(best), "bold green"), (f"  {outcome.configuration(best)}", "dim")
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
        running = self._running
        if not running:
            return [("", Text(self._doing, style="dim"))]
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

    def _running_line(self, one: _Running) -> Text:
        assert self._spec is not None
        bars = wording.sparkline(one.scores).ljust(self._spec.training.evaluations, "·")
        score = wording.score(one.scores[-1] if one.scores else None)
        configuration = wording.compact(one.configuration, self._tuned)
        return Text.assemble((bars, "cyan"), f"  {score:>7}  ", (configuration, "dim"))

    def _running_scores(self, one: _Running) -> Text:
        assert self._spec is not None
        total = self._spec.training.evaluations
        elapsed = wording.duration(time.monotonic() - one.started)
        if not one.scores:
            return Text(f"training, {elapsed}", style="dim")
        loss = one.metrics.get("loss")
        return Text.assemble(
            (wording.sparkline(one.scores).ljust(total, "·"), "cyan"),
            f"  score {wording.score(one.scores[-1])}",
            f"  loss {loss:.3f}" if loss is not None else "",
            (f"  {len(one.scores)} of {total} evaluations, {elapsed}", "dim"),
        )

    def _time(self) -> RenderableType:
        assert self._spec is not None
        elapsed = time.monotonic() - self._opened
        done = Usage.of(self._trials).share(self._spec.budget) - self._share_before
        left = 1.0 - self._share_before - done
        parts = [wording.duration(elapsed)]
        if done > 0 and left > 0:
            parts.append(f"about {wording.duration(elapsed / done * left)} left")
        return Text(" · ".join(parts), style="dim")


def headline(spec: StudySpec) -> str:
    """What the study is, in one line."""
    parts = [f"{spec.model.name} on {spec.data.train}", f"sampler {spec.sampler.name}"]
    parts += [] if spec.packing == "off" else [f"packing {spec.packing}"]
    return f"{spec.name}: {', '.join(parts)}"


def _result(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        parts = [f"score {wording.score(outcome.final_score(trial)):>7}"]
        parts += [f"{key} {attrs[key]:.3f}" for key in ("loss", "cost") if key in attrs]
        return "  ".join(parts)
    if trial.state == TrialState.PRUNED:
        score = wording.score(outcome.final_score(trial))
        return f"pruned {score:>6} after {attrs.get('steps', '?')} steps"
    return f"failed: {attrs.get(outcome.MESSAGE, outcome.failure(trial) or 'no reason known')}"


def _brief(trial: FrozenTrial) -> str:
    return f"{wording.score(outcome.final_score(trial))} (trial {trial.number})"


def _style(trial: FrozenTrial) -> str:
    return {TrialState.COMPLETE: "", TrialState.PRUNED: "dim"}.get(trial.state, "red")


def _trials(number: int) -> str:
    return f"{number} trial" if number == 1 else f"{number} trials"


def create(console: Console, *, plain: bool = False) -> Display:
    """A live panel where ``console`` is a terminal, plain lines elsewhere."""
    moves = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console) if moves and not plain else LineDisplay(console)
