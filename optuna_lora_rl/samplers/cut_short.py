"""Trials that ended through no fault of their configuration, and so are no evidence against it.

A process that is stopped or killed leaves a failed trial behind. Who repeats its configuration
says which one that was: this package's runner in user attributes, Optuna's
``RetryHeartbeatStaleTrialCallback`` in system attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set
from typing import TYPE_CHECKING

from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# User attributes that the runner writes: why a trial failed, and which one a trial repeats.
FAILURE = "failure"
RETRY_OF = "retry_of"
KILLED = "killed"
INTERRUPTED = "interrupted"


def is_cut_short(trial: FrozenTrial, repeated: Set[int]) -> bool:
    """Whether a trial failed only because its process ended.

    A repetition that was killed too is not among them: its configuration may be what kills the
    process, as one does that takes all memory.

    Args:
        trial: any trial.
        repeated: numbers of trials that others repeat, see :func:`repeats`.
    """
    if trial.state != TrialState.FAIL:
        return False
    reason = trial.user_attrs.get(FAILURE)
    if reason == KILLED:
        return RETRY_OF not in trial.user_attrs or trial.number in repeated
    return reason == INTERRUPTED or trial.number in repeated


def repeats(trial: FrozenTrial) -> set[int]:
    """Numbers of the trials, cut short, that this one repeats."""
    told = (trial.user_attrs.get(RETRY_OF), trial.system_attrs.get("failed_trial"))
    return {number for number in told if isinstance(number, int)}


def turn_of(number: int, trials: Sequence[FrozenTrial]) -> int:
    """A trial's number less the trials before it that were cut short.

    Random numbers that follow from the turn are those of a study that was never interrupted.
    """
    repeated: set[int] = set().union(*map(repeats, trials))
    return number - sum(t.number < number and is_cut_short(t, repeated) for t in trials)
