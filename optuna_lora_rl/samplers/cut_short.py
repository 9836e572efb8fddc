"""Trials that ended through no fault of their configuration, and so are no evidence against it.

An interrupted or killed trial says nothing about its configuration, and neither does one that
failed for want of a package, a network or room on a disk. Such trials leave no trace: neither
their parameters nor their numbers change what is proposed. Running out of memory, diverging, a
result that is no number, and every other exception do say something.

Why a trial ended is told by this package's runner in user attributes; by the package's samplers,
under ``Study.optimize``, in system attributes; and by whoever repeats it: the runner, or Optuna's
``RetryHeartbeatStaleTrialCallback``. A trial that was told to have failed by ``Study.tell``, or
that another sampler proposed, counts as failed by its configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler
from optuna.study import _optimize
from optuna.trial import TrialState

from optuna_lora_rl.errors import is_outside
from optuna_lora_rl.samplers import process

if TYPE_CHECKING:
    from types import FrameType

    from optuna.study import Study
    from optuna.trial import FrozenTrial

# User attributes that the runner writes: why a trial failed, and which one a trial repeats.
FAILURE = "failure"
RETRY_OF = "retry_of"
KILLED = "killed"
INTERRUPTED = "interrupted"
# It failed for a reason that lies outside the configuration.
OUTSIDE = "outside"
# System attributes that samplers write: the process that runs a trial, and why it failed there.
PROCESS_KEY = "optuna_lora_rl:process"
FAILURE_KEY = "optuna_lora_rl:failure"
_ITS_OWN = "configuration"


class NotingSampler(BaseSampler):
    """A sampler that writes down which process runs a trial, and why a trial failed."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Write down the process of a trial that ``Study.optimize`` runs.

        A trial that was asked for by hand may run anywhere.
        """
        if _run() is not None:
            study._storage.set_trial_system_attr(trial._trial_id, PROCESS_KEY, process.here())

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Write down why a trial failed that ``Study.optimize`` ran."""
        frame = _run()
        if state != TrialState.FAIL or frame is None:
            return
        # Optuna tells a sampler that a trial failed, and not by what.
        error = frame.f_locals.get("func_err")
        reason = _ITS_OWN
        if isinstance(error, KeyboardInterrupt):
            reason = INTERRUPTED
        elif error is not None and is_outside(error):
            reason = OUTSIDE
        study._storage.set_trial_system_attr(trial._trial_id, FAILURE_KEY, reason)


def _run() -> FrameType | None:
    """The frame of ``Study.optimize`` in which a trial runs, if there is one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _optimize._run_trial.__code__:
        frame = frame.f_back
    return frame


def cut_short(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the trials that are no evidence.

    A configuration that was killed, or failed for a reason outside it, a second time is evidence:
    it may be what takes all memory, or asks for what is not there.

    Args:
        trials: of a study, in the order of their numbers.
    """
    doubtful = [t for t in trials if t.state in (TrialState.FAIL, TrialState.RUNNING)]
    failed = [t for t in doubtful if t.state == TrialState.FAIL]
    found = {t.number for t in doubtful if t.state == TrialState.RUNNING and _is_stale(t)}
    if not failed:
        return found
    repeated: set[int] = set().union(*map(_repeats, trials))
    tried: set[str] = set()
    for trial in failed:
        reason = _reason(trial)
        once = reason in (KILLED, OUTSIDE)
        written = repr(sorted(trial.params.items())) if once else ""
        again = RETRY_OF in trial.user_attrs or written in tried
        if trial.number in repeated or reason == INTERRUPTED or (once and not again):
            found.add(trial.number)
        if once:
            tried.add(written)
    return found


def with_evidence(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials without those that are none."""
    gone = cut_short(trials)
    return [trial for trial in trials if trial.number not in gone] if gone else trials


def _reason(trial: FrozenTrial) -> str | None:
    """Why a trial failed, as far as anybody knows."""
    told: str | None = trial.user_attrs.get(FAILURE, trial.system_attrs.get(FAILURE_KEY))
    if told is None and PROCESS_KEY in trial.system_attrs:
        return KILLED  # its own process did not end it: the storage noticed its silence
    return told


def _is_stale(trial: FrozenTrial) -> bool:
    """Whether a running trial's process is known to have ended."""
    said = trial.system_attrs.get(PROCESS_KEY)
    return said is not None and process.is_gone(said) is True


def _repeats(trial: FrozenTrial) -> set[int]:
    """Numbers of the trials, cut short, that this one repeats."""
    told = (trial.user_attrs.get(RETRY_OF), trial.system_attrs.get("failed_trial"))
    return {number for number in told if isinstance(number, int)}


def turn_of(number: int, gone: set[int]) -> int:
    """A trial's number less the trials before it that were cut short.

    Random numbers that follow from the turn are those of a study that was never interrupted.
    """
    return number - sum(other < number for other in gone)
