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
from rich.text import Text

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.waiting import WaitingLines

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec


class Display:
    """Shows nothing."""

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        """The study begins or goes on, with these trials behind it."""

    def works_on(self, activity: Activity) -> None:
        """Something other than a trial takes its time, such as loading the model."""

    def trial_starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        """A trial begins."""

    def trial_works_on(self, number: int, activity: Activity) -> None:
        """A running trial trains or is evaluated."""

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


_STARTING = Activity("starting")


@dataclass
class RunningTrial:
    """What a display knows of a running trial.

    Attributes:
        configuration: Its parameters.
        scores: What it would have if it ended after each evaluation so far.
        metrics: Those of the last evaluation.
        activity: What it does now.
        started: When it began, on the monotonic clock.
    """

    configuration: Mapping[str, Any]
    scores: list[float] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    activity: Activity = _STARTING
    started: float = field(default_factory=time.monotonic)


class RunningTrials:
    """The trials that run; another thread may draw them, so that it is replaced, never changed.

    Attributes:
        by_number: The trials.
    """

    def __init__(self) -> None:
        self.by_number: dict[int, RunningTrial] = {}

    def starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        self.by_number = {**self.by_number, number: RunningTrial(configuration)}

    def ends(self, number: int) -> None:
        self.by_number = {n: one for n, one in self.by_number.items() if n != number}

    def in_one(self) -> Activity | None:
        """What they do, as one activity; None where none runs."""
        told = [
            f"{number} " * (len(self.by_number) > 1) + wording.activity(one.activity)
            for number, one in self.by_number.items()
        ]
        if not self.by_number:
            return None
        numbers = ", ".join(map(str, self.by_number))
        what = f"trial {numbers}" if len(self.by_number) == 1 else f"trials {numbers}"
        return Activity(what, detail="; ".join(told))


class LineDisplay(Display):
    """One plain line a trial, for logs and pipes, and one now and then while something lasts."""

    def __init__(self, console: Console, *, every: float = 30.0, verbose: bool = False) -> None:
        """Makes the display.

        Args:
            console: Where to.
            every: Seconds of silence after which a line says what is being done.
            verbose: Whether each evaluation has a line.
        """
        self._verbose = verbose
        self._console = console
        self._spec: StudySpec | None = None
        self._running = RunningTrials()
        self._waiting = WaitingLines(self._print, every=every)

    def opens(self, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
        self._spec = spec
        self.says(headline(spec))
        done = Usage.of(trials).trials
        if done:
            self.says(f"going on after {counted_trials(done)}")
        self._waiting.start()

    def works_on(self, activity: Activity) -> None:
        self._waiting.works_on(activity)

    def trial_starts(self, number: int, configuration: Mapping[str, Any]) -> None:
        self._running.starts(number, configuration)
        self._waiting.works_on(self._running.in_one(), first=False)

    def trial_works_on(self, number: int, activity: Activity) -> None:
        self._running.by_number[number].activity = activity
        self._waiting.works_on(self._running.in_one(), first=False)

    def evaluated(
        self, number: int, evaluation: int, score: float, metrics: Mapping[str, float]
    ) -> None:
        if not self._verbose:
            return
        assert self._spec is not None
        known = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        of = self._spec.training.evaluations
        self.says(
            f"trial {number:>3} evaluation {evaluation} of {of}  "
            f"score {wording.score(score):>7}  {known}"
        )

    def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        assert self._spec is not None
        self._running.ends(trial.number)
        self._waiting.works_on(self._running.in_one(), first=False)
        limit = self._spec.budget.trials
        done = f"{Usage.of(trials).trials}" + (f"/{limit}" if limit else "")
        best = outcome.best_of(trials)
        seconds = wording.duration(trial.user_attrs.get("seconds", 0.0))
        self.says(
            f"trial {trial.number:>3} ({done})  {result(trial)}  {seconds:>10}  "
            f"{outcome.configuration(trial)}" + (f"  [best {brief(best)}]" if best else "")
        )

    def says(self, sentence: str) -> None:
        self._waiting.write(sentence)

    def closes(self) -> None:
        self._waiting.stop()

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def headline(spec: StudySpec) -> str:
    """What the study is, in one line."""
    parts = [f"{spec.model.name} on {spec.data.train}", f"sampler {spec.sampler.name}"]
    parts += [] if spec.packing == "off" else [f"packing {spec.packing}"]
    return f"{spec.name}: {', '.join(parts)}"


def result(trial: FrozenTrial) -> str:
    """How a trial ended, in a few words."""
    attrs = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        parts = [f"score {wording.score(outcome.final_score(trial)):>7}"]
        parts += [f"{key} {attrs[key]:.3f}" for key in ("loss", "cost") if key in attrs]
        return "  ".join(parts)
    if trial.state == TrialState.PRUNED:
        score = wording.score(outcome.final_score(trial))
        return f"pruned {score:>6} after {attrs.get('steps', '?')} steps"
    return f"failed: {attrs.get(outcome.MESSAGE, outcome.failure(trial) or 'no reason known')}"


def brief(trial: FrozenTrial) -> str:
    """A trial's score and number."""
    return f"{wording.score(outcome.final_score(trial))} (trial {trial.number})"


def style(trial: FrozenTrial) -> str:
    """The style in which rich writes a trial of this state."""
    return {TrialState.COMPLETE: "", TrialState.PRUNED: "dim"}.get(trial.state, "red")


def counted_trials(number: int) -> str:
    """So many trials, in words."""
    return f"{number} trial" if number == 1 else f"{number} trials"
