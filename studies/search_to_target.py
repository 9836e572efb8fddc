"""One study until its target is reached, and what it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

import measuring

if TYPE_CHECKING:
    import optuna

TOLERANCE = 1e-3


class Search:
    """One study until its target is reached, and what it took.

    Args:
        study: An Optuna study that maximises.
        suggest: Gives a trial its configuration.
        job: ``trials`` at most, ``target`` or None, ``evaluations`` of a trial.
        tokens: Counts while the study runs.

    Attributes:
        reached: Whether a finished trial has reached the target.
    """

    def __init__(
        self,
        study: optuna.Study,
        suggest: Callable[[optuna.Trial], Mapping[str, Any]],
        job: measuring.Job,
        tokens: measuring.Tokens,
    ) -> None:
        self.reached = False
        self._study = study
        self._suggest = suggest
        self._job = job
        self._tokens = tokens
        self._clock = time.monotonic if measuring.on_gpu(job["device"]) else time.process_time
        self._began = self._clock()
        self._asked = 0
        self._seconds = {"sampler": 0.0, "pruner": 0.0}
        self._ended: list[dict[str, Any]] = []

    def ask(self) -> tuple[optuna.Trial, Mapping[str, Any]] | None:
        """Return the next trial, or None when there are no more."""
        if self.reached or self._asked == self._job["trials"]:
            return None
        self._asked += 1
        began = self._clock()
        trial = self._study.ask()
        configuration = self._suggest(trial)
        self._took("sampler", began)
        return trial, configuration

    def report(self, trial: optuna.Trial) -> Callable[[float], None]:
        """Return a function that takes the trial's scores and may raise ``TrialPruned``."""
        import optuna

        evaluation = 0

        def report(score: float) -> None:
            nonlocal evaluation
            evaluation += 1
            began = self._clock()
            trial.report(score, evaluation)
            prune = evaluation < self._job["evaluations"] and trial.should_prune()
            self._took("pruner", began)
            if prune:
                raise optuna.TrialPruned

        return report

    def tell(self, trial: optuna.Trial, outcome: float | Exception) -> None:
        """Take a trial's score, or what ended it."""
        import optuna

        began = self._clock()
        score = None
        if isinstance(outcome, optuna.TrialPruned):
            state = optuna.trial.TrialState.PRUNED
        elif isinstance(outcome, Exception) or not math.isfinite(outcome):
            state = optuna.trial.TrialState.FAIL
        else:
            state, score = optuna.trial.TrialState.COMPLETE, float(outcome)
        self._study.tell(trial, score, state)
        self._took("sampler", began)
        self._ended.append({"trial": trial.number, "state": state.name, "score": score})
        self._ended[-1] |= self._spent()
        target = self._job["target"]
        if score is not None and target is not None and score >= target - TOLERANCE:
            self.reached = True

    def result(self) -> measuring.Result:
        scores = [end["score"] for end in self._ended if end["score"] is not None]
        return {
            **self._spent(),
            "reached": self.reached,
            "best": max(scores, default=None),
            "trials": len(self._ended),
            "begun": self._asked,
            "sampler_seconds": round(self._seconds["sampler"], 3),
            "pruner_seconds": round(self._seconds["pruner"], 3),
            "ended": self._ended,
        }

    def _spent(self) -> dict[str, Any]:
        return {
            "seconds": round(self._clock() - self._began, 3),
            "tokens": self._tokens.trained,
            "padded_tokens": self._tokens.padded,
            "evaluated_tokens": self._tokens.evaluated,
        }

    def _took(self, part: str, began: float) -> None:
        self._seconds[part] += self._clock() - began
