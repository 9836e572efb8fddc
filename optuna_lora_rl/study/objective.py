"""One trial: ask for a configuration, fine-tune, report, write down, score."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import optuna

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import dashboard
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import storage
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.opening import propose

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.trial import FineTuner
    from optuna_lora_rl.finetuning.trial import TrialResult
    from optuna_lora_rl.study.display import Display
    from optuna_lora_rl.study.interruption import Interruption
    from optuna_lora_rl.study.spec import StudySpec
    from optuna_lora_rl.vocabulary import Configuration

_MIB = 1 << 20


class Objective:
    """Optuna's objective for one study.

    Every trial trains with the seed ``training.seed``, so that differences between trials are
    due to their configurations.

    Args:
        spec: The study.
        tuner: Trains one configuration after the other.
        display: Is told what happens.
        interruption: Says when a signal may stop a trial.
    """

    def __init__(
        self,
        *,
        spec: StudySpec,
        tuner: FineTuner,
        display: Display,
        interruption: Interruption,
    ) -> None:
        self._spec = spec
        self._tuner = tuner
        self._display = display
        self._interruption = interruption

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """The trial's score, or its quality and cost.

        Raises:
            optuna.TrialPruned: If the pruner stopped the trial.
            TrialFailed: If the trial failed by itself; its reason is written down.
            KeyboardInterrupt: On Ctrl-C.
            Exception: If the disk or the database failed.
        """
        outcome.mark_owner(trial)
        configuration = propose(self._spec, trial)
        self._display.trial_starts(trial.number, configuration)
        started = time.monotonic()
        try:
            result = self._train(trial, configuration)
            _record(trial, result)
            dashboard.attach(trial, result, self._spec)
        except optuna.TrialPruned:
            trial.set_user_attr("seconds", _since(started))
            raise
        except KeyboardInterrupt:
            trial.set_user_attr("seconds", _since(started))
            _end_early(trial, "the run was interrupted")
            raise
        except Exception as error:
            fatal = storage.fatal_cause(error)
            if fatal is not None:
                with suppress(optuna.exceptions.StorageInternalError):
                    _end_early(trial, "the disk or the database failed")
                raise fatal from None
            trial.set_user_attr("seconds", _since(started))
            reason = _reason(error)
            outcome.fail(trial, reason, _words(error))
            raise outcome.TrialFailed(reason) from error
        if self._spec.n_objectives > 1:
            return result.quality, result.cost
        return result.score

    def _train(self, trial: optuna.Trial, configuration: Configuration) -> TrialResult:
        evaluations = 0

        def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
            nonlocal evaluations
            evaluations += 1
            with self._interruption.shield():
                self._display.evaluated(evaluations, score, metrics)
                if self._spec.n_objectives == 1:
                    self._judge(trial, evaluations, step, score, metrics)

        with _own_tensorboard_folder(self._spec, trial.number), self._interruption.window():
            return self._tuner.run(
                configuration,
                seed=self._spec.training.seed,
                report=report,
                folder=adapters.folder_of(self._spec.folder, trial.number),
                trackers_name=f"{self._spec.name}-trial-{trial.number:04d}",
            )

    def _judge(
        self,
        trial: optuna.Trial,
        evaluation: int,
        step: int,
        score: float,
        metrics: Mapping[str, float],
    ) -> None:
        """Asks the pruner, whose steps are evaluations: batch sizes move the optimizer's."""
        trial.report(score, evaluation)
        of = self._spec.training.evaluations
        if evaluation >= of or not trial.should_prune():
            return
        _set(trial, {"score": score, "steps": step, **metrics})
        if self._spec.objective.cost_weight:
            # What was spent, not what the whole run would have cost.
            whole = (metrics["quality"] - score) / self._spec.objective.cost_weight
            trial.set_user_attr("cost", whole * evaluation / of)
        raise optuna.TrialPruned


@contextmanager
def _own_tensorboard_folder(spec: StudySpec, number: int) -> Iterator[None]:
    """Keeps a trial's TensorBoard files apart from its adapter, which may be deleted."""
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    base = Path(before) if before else spec.folder / "tensorboard"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(base / f"trial-{number:04d}")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before


def _record(trial: optuna.Trial, result: TrialResult) -> None:
    costs = {
        f"cost_{source}" + ("" if part == "total" else f"_{part}"): value
        for source, parts in result.cost_parts.items()
        for part, value in parts.items()
    }
    _set(
        trial,
        {
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
        },
    )


def _end_early(trial: optuna.Trial, message: str) -> None:
    """Fails a trial that did nothing wrong; its parameters are tried again."""
    outcome.fail(trial, outcome.INTERRUPTED, message)
    outcome.run_again(trial.study, trial)


def _set(trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _reason(error: Exception) -> str:
    if isinstance(error, FineTuningError):
        return error.reason
    return "configuration" if isinstance(error, UserError) else "error"


def _words(error: Exception) -> str:
    """The error's first line, with its type where it is not one of our own."""
    line = wording.first_line(error)
    own = isinstance(error, FineTuningError | UserError)
    return line if own else f"{type(error).__name__}: {line}"
