"""How a trial ended, as it is written down with the trial, and what counts against the budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_lora_rl.errors import masked
from optuna_lora_rl.errors import shortened
from optuna_lora_rl.samplers import cut_short
from optuna_lora_rl.study import owner
from optuna_lora_rl.study import rows
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.owner import OWNER

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import Budget


FAILURE = cut_short.FAILURE
MESSAGE = "failure_message"
KILLED = cut_short.KILLED
INTERRUPTED = cut_short.INTERRUPTED
OUTSIDE = cut_short.OUTSIDE
# Takes the place of a trial whose row somebody deleted.
DELETED = "deleted"
# The trial did nothing wrong: it is run again and counts against no budget.
NOT_ITS_OWN_FAULT = {KILLED, INTERRUPTED, DELETED}
RETRY_OF = cut_short.RETRY_OF
# Its place in a study that was never interrupted, from which the random numbers follow.
TURN = "turn"
# Whether the trial ran in a pack, and if not, why.
PACKED = "packed"
ALONE = "alone"
# Marks the trial of the guides' configuration.
GUIDES = "guides"


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


def numbered(trials: Iterable[FrozenTrial], number: int) -> FrozenTrial | None:
    """The trial of that number, wherever in the list it stands; rows may have been deleted."""
    return next((trial for trial in trials if trial.number == number), None)


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The completed trial with the highest score; of equal ones the first."""
    return next(iter(ranked(trials)), None)


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The completed trials, the highest score first; of equal ones the earlier first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: final_score(trial) or 0.0, reverse=True)


def guides_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The completed trial of the guides' configuration; None where there is none."""
    return next((t for t in ranked(trials) if GUIDES in t.user_attrs), None)


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


def is_running(trial: FrozenTrial) -> bool:
    """Whether some process is at work on the trial; not so one that was asked for by hand."""
    return (
        trial.state == TrialState.RUNNING
        and trial.user_attrs.get(OWNER) is not None
        and not owner.is_gone(trial)
    )


def recover(study: optuna.Study) -> list[int]:
    """Fails the trials whose process was killed, and runs each once again.

    On this machine the process itself is looked for. Of other machines' trials the signs of life
    are waited for, by the database's clock.

    Returns:
        The numbers of the killed trials.
    """
    killed = []
    storage, silent = study._storage, rows.silent_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        trial_id, gone = trial._trial_id, owner.is_gone(trial)
        if gone is None:
            gone = trial_id in silent
            if trial.user_attrs.get(OWNER) is not None:
                rows.begin_silence(study, trial_id)
        if not gone:
            continue
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
        kept = {GUIDES: True} if GUIDES in trial.user_attrs else {}
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, **kept})


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


@dataclass(frozen=True)
class Usage:
    """What has been used up.

    Attributes:
        trials: Completed, pruned and failed trials.
        running: Trials that some process is at work on.
        hours: Time of all trials but the killed ones, whose end nobody saw.
        cost: Cost of all trials, in runs of the reference configuration.
    """

    trials: int
    running: int
    hours: float
    cost: float

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> Usage:
        trials = list(trials)
        return cls(
            trials=sum(counts(trial) for trial in trials),
            running=sum(is_running(trial) for trial in trials),
            hours=sum(float(trial.user_attrs.get("seconds", 0.0)) for trial in trials) / 3600,
            cost=sum(float(trial.user_attrs.get("cost", 0.0)) for trial in trials),
        )

    def exhausted(self, budget: Budget) -> str | None:
        """Which limit leaves no room for another trial, in words, or None.

        Trials that other workers are at work on count, so that many workers together make the
        wished number and no more.
        """
        if budget.trials is not None and self.trials + self.running >= budget.trials:
            return f"{self.trials} of {budget.trials} trials"
        if budget.hours is not None and self.hours >= budget.hours:
            return wording.of_hours(self.hours, budget.hours)
        if budget.cost is not None and self.cost >= budget.cost:
            return f"cost {self.cost:.3g} of {budget.cost:g}"
        return None

    def shared_out(self, budget: Budget) -> str:
        """What is finished and what others are still at work on, in words."""
        of = f" of {budget.trials}" if budget.trials is not None else ""
        others = "1 runs in another worker"
        if self.running > 1:
            others = f"{self.running} run in other workers"
        return f"{self.trials}{of} trials are finished, {others}"

    def trials_in_all(self, budget: Budget) -> int | None:
        """How many trials there will have been at the end of the budget, at their mean price.

        None where nothing says so.
        """
        told = [] if budget.trials is None else [budget.trials]
        for used, limit in ((self.hours, budget.hours), (self.cost, budget.cost)):
            if limit and used > 0 and self.trials:
                told.append(max(round(self.trials * limit / used), self.trials))
        return min(told, default=None)

    def share(self, budget: Budget) -> float:
        """How much of the budget is used, from 0 to 1, by the limit that is nearest."""
        limits = (
            (self.trials, budget.trials),
            (self.hours, budget.hours),
            (self.cost, budget.cost),
        )
        return min(1.0, max((used / limit for used, limit in limits if limit), default=0.0))
