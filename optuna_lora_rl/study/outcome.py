"""How a trial ended, as it is written down with the trial, and what counts against the budget."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_lora_rl.errors import masked
from optuna_lora_rl.errors import shortened
from optuna_lora_rl.samplers import cut_short
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FAILURE = cut_short.FAILURE
MESSAGE = "failure_message"
KILLED = cut_short.KILLED
INTERRUPTED = cut_short.INTERRUPTED
# The trial did nothing wrong: it is run again and counts against no budget.
NOT_ITS_OWN_FAULT = {KILLED, INTERRUPTED}
RETRY_OF = cut_short.RETRY_OF
# Whether the trial ran in a pack, and if not, why.
PACKED = "packed"
ALONE = "alone"


def fail(trial: optuna.Trial, reason: str, message: str) -> None:
    """Writes down why the trial is about to fail."""
    trial.set_user_attr(FAILURE, reason)
    trial.set_user_attr(MESSAGE, shortened(masked(message)))


def failure(trial: FrozenTrial) -> str | None:
    """The reason that was written down, or None."""
    return trial.user_attrs.get(FAILURE)


def counts(trial: FrozenTrial) -> bool:
    """Whether the trial is one of the wished number."""
    if trial.state == TrialState.FAIL:
        reason = failure(trial)
        # Failed without a reason: another worker died and the storage noticed its silence.
        return reason is not None and reason not in NOT_ITS_OWN_FAULT
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def tried(trials: Iterable[FrozenTrial]) -> int:
    """How many different configurations have a result, or will have one."""
    own = (trial for trial in trials if counts(trial) or is_running(trial))
    return len({repr(trial.user_attrs.get("configuration")) for trial in own})


def counts_in_words(trials: Iterable[FrozenTrial]) -> list[str]:
    """How many trials of those that count ended how, such as ``["9 completed", "3 pruned"]``."""
    states = [trial.state for trial in trials if counts(trial)]
    words = {
        TrialState.COMPLETE: "completed",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    return [f"{states.count(state)} {words[state]}" for state in words if state in states]


def final_score(trial: FrozenTrial) -> float | None:
    """The score of a finished trial; a Pareto study's trials have one too."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if "score" in trial.user_attrs:
        return float(trial.user_attrs["score"])
    # Told by hand: a value and nothing else.
    return trial.values[0] if trial.values else None


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The completed trial with the highest score; of equal ones the first."""
    return next(iter(ranked(trials)), None)


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The completed trials, the highest score first; of equal ones the earlier first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: final_score(trial) or 0.0, reverse=True)


def configuration(trial: FrozenTrial) -> str:
    """What the trial tried, in one line."""
    return wording.compact(trial.user_attrs.get("configuration", trial.params), trial.params)


def side_by_side(trials: Iterable[FrozenTrial]) -> str | None:
    """How many trials ran in a pack and why the others did not; None where nothing was packed."""
    packed = [trial for trial in trials if counts(trial) and PACKED in trial.user_attrs]
    if not packed:
        return None
    alone = Counter(str(t.user_attrs[ALONE]) for t in packed if ALONE in t.user_attrs)
    text = f"{len(packed) - alone.total()} trials side by side"
    reasons = "; ".join(f"{count} x {reason}" for reason, count in alone.most_common())
    return f"{text}, {alone.total()} alone ({reasons})" if alone else text


def mark_owner(trial: optuna.Trial) -> None:
    """Writes down which process runs the trial, for the case that it is killed."""
    process = psutil.Process()
    trial.set_user_attr("host", socket.gethostname())
    trial.set_user_attr("pid", os.getpid())
    trial.set_user_attr("process_started", process.create_time())


def ran_here(trial: FrozenTrial) -> bool:
    """Whether the trial ran on this machine."""
    return trial.user_attrs.get("host") == socket.gethostname()


def owner_is_gone(trial: FrozenTrial) -> bool:
    """Whether the trial ran on this machine, in a process that no longer exists."""
    attrs = trial.user_attrs
    if attrs.get("host") != socket.gethostname() or "pid" not in attrs:
        return False
    try:
        started = psutil.Process(int(attrs["pid"])).create_time()
    except psutil.Error:
        return True
    # A process id may have been given to another process since.
    return abs(started - float(attrs["process_started"])) > 1.0


def is_running(trial: FrozenTrial) -> bool:
    """Whether some process is at work on the trial."""
    return (
        trial.state == TrialState.RUNNING
        and "pid" in trial.user_attrs
        and not owner_is_gone(trial)
    )


def recover(study: optuna.Study) -> list[int]:
    """Fails the trials whose process on this machine was killed, and runs each once again.

    Trials of other machines are left to the storage's heartbeat.

    Returns:
        The numbers of the killed trials.
    """
    killed = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state != TrialState.RUNNING or not owner_is_gone(trial):
            continue
        storage, trial_id = study._storage, trial._trial_id
        try:
            storage.set_trial_user_attr(trial_id, FAILURE, KILLED)
            storage.set_trial_user_attr(trial_id, MESSAGE, "the process was killed in mid-trial")
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            # Another worker, started together with this one, recovers it.
            continue
        killed.append(trial.number)
        if RETRY_OF not in trial.user_attrs:
            # Once only: a configuration that takes all memory may be what kills the process.
            run_again(study, trial)
    return killed


def run_again(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> None:
    """Enqueues the parameters of a trial that was cut short."""
    if trial.params:
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})


def hopeless(
    own: Iterable[FrozenTrial], all_trials: Iterable[FrozenTrial], *, limit: int = 3
) -> str | None:
    """Why to stop, if no trial ever succeeded and this run's first ones fail the same way.

    Args:
        own: The trials of this run, in their order.
        all_trials: The trials of the study.
        limit: How many equal failures are enough.

    Returns:
        The failure's message, or None.
    """
    first = [trial for trial in own if counts(trial)][:limit]
    succeeded = any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in all_trials)
    if succeeded or len(first) < limit or len({_way(trial) for trial in first}) > 1:
        return None
    return str(first[0].user_attrs.get(MESSAGE, failure(first[0])))


def _way(trial: FrozenTrial) -> tuple[str | None, str]:
    reason = failure(trial)
    if reason in ("diverged", "out-of-memory"):
        return reason, ""
    # Equal messages but for their numbers (sizes, steps).
    return reason, re.sub(r"\d+", "0", str(trial.user_attrs.get(MESSAGE, "")))
