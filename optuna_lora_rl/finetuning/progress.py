"""One run as it goes: its curve, its score so far, and when to stop it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping

from optuna_lora_rl.finetuning import evaluation
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.evaluation import Evaluation

# Called at each evaluation with the step, the score of the whole run if it had this quality at its
# end, and the metrics. The score charges the run's counted cost even where the objective's is
# measured: what a run takes is known when it is over. Among the metrics is `evaluation`, the
# number of this one of `training.evaluations`. It may raise, to end the run.
Report = Callable[[int, float, Mapping[str, float]], None]


class Progress:
    """Takes the evaluations of one run.

    Args:
        metric: What quality means.
        numbers: The number of each step's evaluation.
        baselines: The untuned model's evaluation on what each step's evaluation reads.
        charge: What the whole run's counted cost takes off the score.
        steps: Steps of the whole run.
        patience: Evaluations without a better quality after which the run ends; 0 for never.
        generate: Gives the metrics of generated answers after a step, if the metric needs them.
        report: The caller's function.

    Attributes:
        curve: The evaluations so far.
        values: Metrics of the last one.
        stopped_early: Whether the patience ran out before the last step.
    """

    def __init__(
        self,
        *,
        metric: str,
        numbers: Mapping[int, int],
        baselines: Mapping[int, Evaluation],
        charge: float,
        steps: int,
        patience: int,
        generate: Callable[[int], dict[str, float]],
        report: Report | None,
    ) -> None:
        self.curve: list[dict[str, float]] = []
        self.values: dict[str, float] = {}
        self.stopped_early = False
        self._metric = metric
        self._numbers = numbers
        self._baselines = baselines
        self._charge = charge
        self._steps = steps
        self._patience = patience
        self._generate = generate
        self._report = report
        self._raised: BaseException | None = None

    def evaluated(self, step: int, epoch: float, metrics: dict[str, float]) -> bool:
        """Takes TRL's metrics of one evaluation and returns whether the run shall end.

        Raises:
            FineTuningError: When the loss is no finite number.
            Exception: Whatever the caller's function raises.
        """
        values = evaluation.teacher_forced(metrics)
        _check_finite(values, step)
        values.update(self._generate(step))
        quality = evaluation.quality(self._metric, values, self._baselines[step])
        score = quality - self._charge
        self.values = values
        row = {"step": step, "epoch": epoch, **values, "quality": quality, "score": score}
        row["untuned_loss"] = self._baselines[step].loss
        if "train_loss" in metrics:
            row["train_loss"] = float(metrics["train_loss"])
        self.curve.append(row)
        if self._report is not None:
            try:
                number = self._numbers[step]
                self._report(step, score, {**values, "quality": quality, "evaluation": number})
            except BaseException as error:
                self._raised = error
                raise
        self.stopped_early = step < self._steps and self._is_stagnant()
        return self.stopped_early

    def ended(self, values: dict[str, float], baseline: Evaluation) -> None:
        """Puts an evaluation of everything in place of the last, which read a part.

        Args:
            values: Its metrics.
            baseline: The untuned model's, of everything too.

        Raises:
            FineTuningError: When the loss is no finite number.
        """
        row = self.curve[-1]
        _check_finite(values, int(row["step"]))
        quality = evaluation.quality(self._metric, values, baseline)
        self.values = values
        row.update(values, quality=quality, score=quality - self._charge)
        row["untuned_loss"] = baseline.loss

    def is_callers(self, error: BaseException) -> bool:
        """Whether the caller's function raised this error."""
        return error is self._raised

    def _is_stagnant(self) -> bool:
        # Where evaluations read ever more, each quality is the gain over the untuned model on the
        # same examples: they compare but for the scatter of a part around the whole.
        qualities = [point["quality"] for point in self.curve]
        since_best = len(qualities) - 1 - qualities.index(max(qualities))
        return 0 < self._patience <= since_best


def _check_finite(values: Mapping[str, float], step: int) -> None:
    if not evaluation.is_finite(values):
        raise FineTuningError(
            "diverged", f"the evaluation loss was {values['loss']} at step {step}"
        )
