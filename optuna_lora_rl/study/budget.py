"""What a study has used of its budget, over all its runs and workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import Budget


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
            trials=sum(outcome.counts(trial) for trial in trials),
            running=sum(outcome.is_running(trial) for trial in trials),
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

    def share(self, budget: Budget) -> float:
        """How much of the budget is used, from 0 to 1, by the limit that is nearest."""
        limits = (
            (self.trials, budget.trials),
            (self.hours, budget.hours),
            (self.cost, budget.cost),
        )
        return min(1.0, max((used / limit for used, limit in limits if limit), default=0.0))
