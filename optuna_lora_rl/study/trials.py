"""A study's trials from question to answer: ask, follow, judge, write down, tell.

Training is somebody else's: whoever trains takes a :class:`TrialRequest` from ``next`` whenever
there is a place, and hands its result to ``done``. So one trial at a time and many side by side
are written down by the same hand, and in the same words.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from typing import Any

import optuna
from optuna.trial import TrialState

from optuna_lora_rl import pruners
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.errors import is_outside
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.errors import MachineError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import dashboard
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import storage
from optuna_lora_rl.study.opening import propose

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.activity import Activity
    from optuna_lora_rl.finetuning.finetuner import Report
    from optuna_lora_rl.finetuning.trial import TrialRequest
    from optuna_lora_rl.finetuning.trial import TrialResult
    from optuna_lora_rl.study.display import Display
    from optuna_lora_rl.study.heartbeat import Heartbeat
    from optuna_lora_rl.study.interruption import Interruption
    from optuna_lora_rl.study.owner import Owner
    from optuna_lora_rl.study.spec import StudySpec

_log = logging.getLogger(__name__)
_MIB = 1 << 20


@dataclass
class _Running:
    """A trial that was asked for and has no result yet.

    Attributes:
        trial: The trial.
        seconds: Its share of the time: what passes is divided among the trials that run.
    """

    trial: optuna.Trial
    seconds: float = 0.0


class Trials:
    """Begins the trials of one worker and ends them, however many run at a time.

    Every trial trains with the seed ``training.seed``, so that differences between trials are
    due to their configurations. Signals wait while anything is written down.

    Args:
        study: Gets the trials.
        spec: The study's file.
        display: Is told what happens.
        interruption: Says when a signal may stop a trial.
        owner: Asks for the trials, as theirs.
        heartbeat: Shows that the trials are alive.
        packed: Whether trials run side by side.
        may_begin: Whether another trial may begin now.
        ended: Called with every trial that has ended.
        settle: Called at every step, to take this run's share of the machine.
    """

    def __init__(
        self,
        study: optuna.Study,
        spec: StudySpec,
        *,
        display: Display,
        interruption: Interruption,
        owner: Owner,
        heartbeat: Heartbeat,
        packed: bool,
        may_begin: Callable[[], bool],
        ended: Callable[[FrozenTrial], None],
        settle: Callable[[], None],
    ) -> None:
        self._study = study
        self._spec = spec
        self._display = display
        self._interruption = interruption
        self._owner = owner
        self._heartbeat = heartbeat
        self._packed = packed
        self._may_begin = may_begin
        self._ended = ended
        self._settle = settle
        self._running: dict[int, _Running] = {}
        self._shared_out = time.monotonic()

    def next(self) -> TrialRequest | None:
        """Asks for a trial that differs from those that run, or None where none may begin now."""
        from optuna_lora_rl.finetuning.trial import TrialRequest

        with self._interruption.shield():
            self._share_out()
            outcome.recover(self._study)
            # Workers in turn, so that together they begin no more than the wished number.
            with output.lock(self._spec.folder):
                if not self._may_begin():
                    return None
                trial = self._owner.ask(self._study)
            running = self._running[trial.number] = _Running(trial)
            self._heartbeat.begins(trial)
            if self._packed:
                trial.set_user_attr(outcome.PACKED, True)
            configuration = propose(self._spec, trial)
            self._display.trial_starts(trial.number, configuration)
            return TrialRequest(
                number=trial.number,
                configuration=configuration,
                seed=self._spec.training.seed,
                report=self._report(running),
                folder=adapters.folder_of(self._spec.folder, trial.number),
                trackers_name=f"{self._spec.name}-trial-{trial.number:04d}",
                on_activity=partial(self._works_on, trial.number),
            )

    def _works_on(self, number: int, activity: Activity) -> None:
        self._settle()
        self._display.trial_works_on(number, activity)

    def done(self, run: TrialRequest, result: TrialResult | Exception) -> None:
        """Writes down how a trial ended.

        Args:
            run: As ``next`` gave it.
            result: What it gave, or what it raised: ``TrialPruned``, or whatever made it fail.

        Raises:
            Exception: If the disk or the database failed; the trial is then still to be ended.
        """
        with self._interruption.shield():
            self._share_out()
            running = self._running[run.number]
            try:
                self._tell(running, result)
            except optuna.exceptions.UpdateFinishedTrialError:
                # This process was stopped for so long that another one took it for dead.
                self._display.says(f"another worker gave trial {run.number} up meanwhile")
            self._forget(running)
            self._ended(self._study._storage.get_trial(running.trial._trial_id))

    def says(self, note: str) -> None:
        """Shows a note of the pack."""
        with self._interruption.shield():
            self._display.says(note)
            _log.info(note)

    def alone(self, request: TrialRequest, reason: str) -> None:
        """Shows which trial trains alone, and keeps with it why.

        Args:
            request: As ``next`` gave it.
            reason: Why it shares no pass with others.
        """
        with self._interruption.shield():
            self.says(f"trial {request.number} runs alone: {reason}")
            running = self._running.get(request.number)
            if running is not None:
                running.trial.set_user_attr(outcome.PACKED, False)
                running.trial.set_user_attr(outcome.ALONE, reason)

    def give_up(self, reason: str) -> None:
        """Fails the trials that still run and did nothing wrong; they are tried again.

        Args:
            reason: Why, in words.
        """
        self._share_out()
        for running in list(self._running.values()):
            trial = running.trial
            # Where even this cannot be written down, the next run finds a killed trial.
            with suppress(
                optuna.exceptions.StorageInternalError, optuna.exceptions.UpdateFinishedTrialError
            ):
                trial.set_user_attr("seconds", round(running.seconds, 3))
                outcome.fail(trial, outcome.INTERRUPTED, reason)
                if "configuration" in trial.user_attrs:
                    outcome.run_again(self._study, trial)
                self._study.tell(trial, state=TrialState.FAIL)
            self._forget(running)

    def _report(self, running: _Running) -> Report:
        def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
            with self._interruption.shield():
                values = dict(metrics)
                evaluation = int(values.pop("evaluation"))
                self._display.evaluated(running.trial.number, evaluation, score, values)
                self._judge(running.trial, evaluation, step, score, values)

        return report

    def _judge(
        self,
        trial: optuna.Trial,
        evaluation: int,
        step: int,
        score: float,
        metrics: Mapping[str, float],
    ) -> None:
        """Asks the pruner, whose steps are evaluations: batch sizes move the optimizer's."""
        weight, of = self._spec.objective.cost_weight, self._spec.training.evaluations
        # What the whole run is counted to cost.
        cost = (metrics["quality"] - score) / weight if weight else None
        if self._spec.n_objectives == 1:
            pruners.report(trial, score, evaluation)
        elif cost is not None:
            pruners.report(trial, (metrics["quality"], cost), evaluation)
        may_prune = evaluation < of and outcome.GUIDES not in trial.user_attrs
        if not may_prune or not pruners.should_prune(trial):
            return
        _set(trial, {"score": score, "steps": step, **metrics})
        if cost is not None:
            # What was spent, not what the whole run would have cost.
            trial.set_user_attr("cost", cost * evaluation / of)
        raise optuna.TrialPruned

    def _tell(self, running: _Running, result: TrialResult | Exception) -> None:
        trial = running.trial
        if not isinstance(result, Exception):
            try:
                values = self._record(trial, result)
            except Exception as error:
                result = error
            else:
                self._study.tell(trial, values)
                return
        fatal = storage.fatal_cause(result)
        if fatal is not None:
            raise fatal from None
        if isinstance(result, MachineError):
            self._stop(running, result)
        trial.set_user_attr("seconds", round(running.seconds, 3))
        if isinstance(result, optuna.TrialPruned):
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        outcome.fail(trial, _reason(result), _words(result))
        self._study.tell(trial, state=TrialState.FAIL)

    def _stop(self, running: _Running, error: MachineError) -> None:
        """Ends the run: after such an error the process cannot train any more."""
        trial = running.trial
        if outcome.RETRY_OF in trial.user_attrs:
            # Twice with one configuration: it may be the cause after all.
            outcome.fail(trial, "error", str(error))
            self._study.tell(trial, state=TrialState.FAIL)
            self._forget(running)
        raise UserError(
            f"the machine failed in trial {trial.number}: {error}; every finished trial is kept, "
            "and the same command goes on where it stopped"
        )

    def _record(self, trial: optuna.Trial, result: TrialResult) -> list[float]:
        """Writes down what there is to know of a trial, and returns its values."""
        values = [result.score]
        if self._spec.n_objectives > 1:
            values = [result.quality, result.cost]
        if not all(map(math.isfinite, values)):
            raise FineTuningError("diverged", f"the result is {values}")
        # Before what refers to it: whoever sees a trial complete finds its layers.
        kept = layers.keep(self._spec.folder, trial.number, result)
        _set(trial, {**_attributes(result), **kept})
        dashboard.attach(trial, result, self._spec)
        return values

    def _forget(self, running: _Running) -> None:
        self._heartbeat.ends(running.trial)
        del self._running[running.trial.number]

    def _share_out(self) -> None:
        """Gives each running trial its share of the time that has passed."""
        now = time.monotonic()
        for running in self._running.values():
            running.seconds += (now - self._shared_out) / len(self._running)
        self._shared_out = now


def _attributes(result: TrialResult) -> dict[str, Any]:
    costs = {
        f"cost_{source}" + ("" if part == "total" else f"_{part}"): value
        for source, parts in result.cost_parts.items()
        for part, value in parts.items()
    }
    return {
        "score": result.score,
        "quality": result.quality,
        "cost": result.cost,
        **result.metrics,
        "trainable_parameters": result.trainable_parameters,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "peak_memory_mb": round(result.peak_memory_bytes / _MIB, 1),
        "stopped_early": result.stopped_early,
        **costs,
        "curve": result.curve,
        **({"truncation": result.truncation} if result.truncation else {}),
    }


def _set(trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def _reason(error: Exception) -> str:
    if isinstance(error, FineTuningError):
        return error.reason
    if isinstance(error, UserError):
        return "configuration"
    return outcome.OUTSIDE if is_outside(error) else "error"


def _words(error: Exception) -> str:
    """The error's first line, with its type where it is not one of our own."""
    line = first_line(error)
    own = isinstance(error, FineTuningError | UserError)
    return line if own else f"{type(error).__name__}: {line}"
