"""TRL's trainer for one run: when it evaluates, and what an evaluation measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.merged import merged
from optuna_lora_rl.finetuning.model_call import PLAIN
from optuna_lora_rl.finetuning.model_call import learnt_only

# Called after each evaluation with step, epoch and TRL's metrics, and `train_loss`, the mean
# training loss of the steps since the evaluation before; True ends the run.
OnEvaluation = Callable[[int, float, dict[str, float]], bool]


class Trainer(SFTTrainer):
    """TRL's trainer, whose evaluations measure the same whatever it trains on.

    Attributes:
        after_backward: Called in each step between the backward pass and the optimizer.
        stages: What the evaluation after each step reads; None for one data set always.
        evaluations: Takes the training losses.
        merges: Whether evaluations may add the updates to the base weights for their time.
        call: How the model is called.
    """

    after_backward: Callable[[], None] | None = None
    stages: Mapping[int, Dataset] | None = None
    evaluations: Evaluations | None = None
    merges = False
    call = PLAIN

    def learnt(self, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """Selects what is learnt of a batch."""
        return learnt_only(self.model, inputs, self.call)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.stages is not None:
            self.eval_dataset = self.stages[self.state.global_step]
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        # Every row, with padding and a mask: options of training may drop rows or join them.
        return DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=DataCollatorForLanguageModeling(
                pad_token_id=self.processing_class.pad_token_id
            ),
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._sums: Counter[str] = Counter()
        with merged(self.model) if self.merges else nullcontext():
            output = super().evaluation_loop(*args, **kwargs)
        # Over tokens, as if all were one batch; the loop's own loss is the mean over batches.
        means = {
            f"eval_{name}": total / self._sums["tokens"] for name, total in self._sums.items()
        }
        output.metrics.update({**means, "eval_tokens": self._sums["tokens"]})
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Measures a batch by plain cross-entropy, whatever is trained on."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            with self.learnt(inputs) as selected:
                found = model(**selected, fused_lm_head=True)
        tokens = found.label_mask.sum()
        loss = -found.log_probs.sum()
        sums = {"loss": loss, "mean_token_accuracy": found.is_top1.sum(), "tokens": tokens}
        sums["entropy"] = found.entropy.sum()
        self._sums.update({name: total.item() for name, total in sums.items()})
        return loss / tokens, None, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if return_outputs or self.label_smoother is not None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        with self.learnt(inputs) as selected:
            return super().compute_loss(model, selected, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FineTuningError(
                "diverged", f"the training loss was {loss.item()} at step {self.state.global_step}"
            )
        if self.evaluations is not None:
            self.evaluations.losses += float(loss)
        if self.after_backward is not None:
            self.after_backward()
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The package counts by itself; transformers would walk all parameters at every step.
        return 0


class Batches(TrainerCallback):
    """Tells how far an evaluation is."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress
        self._done = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self._done += 1
        self._progress(self._done, len(eval_dataloader))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self._done = 0


class Evaluations(Batches):
    """Has the model evaluated after certain steps, and hands the metrics on.

    Attributes:
        raised: What the caller's function raised.
        losses: Sum of the training losses since the last evaluation, of which each forward pass
            adds its part of its step's.
    """

    def __init__(
        self, steps: Collection[int], on_evaluation: OnEvaluation, on_activity: OnActivity
    ) -> None:
        super().__init__(self._evaluates)
        self.raised: BaseException | None = None
        self.losses = 0.0
        self._since = 0
        self._steps = steps
        self._on_evaluation = on_evaluation
        self._on_activity = on_activity
        self._evaluating = "evaluating"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        control.should_evaluate = step in self._steps
        self._evaluating = f"evaluating at step {step} of {state.max_steps}"
        loss = f"loss {self.losses / (step - self._since):.3f}"
        self._on_activity(Activity("training", step, state.max_steps, "steps", loss))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        step = state.global_step
        if step > self._since:
            metrics = {**metrics, "train_loss": self.losses / (step - self._since)}
        self.losses, self._since = 0.0, step
        # A pruned run ends through the trainer's own door, so that trackers close.
        try:
            stop = self._on_evaluation(step, float(state.epoch or 0.0), metrics)
        except Exception as error:
            self.raised, stop = error, True
        control.should_training_stop = control.should_training_stop or stop

    def _evaluates(self, done: int, total: int) -> None:
        self._on_activity(Activity(self._evaluating, done, total, "batches"))
