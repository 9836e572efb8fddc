"""Ranks that change while a transformers or TRL trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import Literal

import torch
from torch import nn
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import monitor
from optuna_lora_rl.rank import resizing
from optuna_lora_rl.rank.deciders import GradientSpectrum
from optuna_lora_rl.rank.deciders import LossCurve
from optuna_lora_rl.rank.monitor import Monitor
from optuna_lora_rl.rank.probe import GradientSketches


@dataclass(frozen=True)
class RankChange:
    """One layer's change of rank.

    Attributes:
        step: Optimizer steps taken before it.
        layer: The layer.
        before: Its rank before.
        after: Its rank since.
        reason: Why.
        error: What of the update was lost in shrinking, relative to the update.
    """

    step: int
    layer: str
    before: int
    after: int
    reason: str
    error: float

    def __str__(self) -> str:
        return (
            f"after step {self.step}: {self.layer} from rank {self.before} to {self.after}, "
            f"because {self.reason}"
        )


class _RankCallback(TrainerCallback):
    """Applies a decider's ranks.

    Attributes:
        changes: What changed, in order.
    """

    def __init__(
        self,
        decider: LossCurve | GradientSpectrum,
        *,
        seed: int,
        changed: Callable[[RankChange], None] | None,
    ) -> None:
        self.changes: list[RankChange] = []
        self._changed = changed
        self._decider = decider
        self._generator = torch.Generator().manual_seed(seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                "ranks that change in training need a single device: several processes share "
                "buffers of fixed shapes"
            )
        # Refuses here rather than at the first change.
        _ranks(kwargs["model"])

    def _take(self, observed: Any, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        """Shows the decider what it judges by, and does what it says."""
        # After the last step a change would only be saved, never trained.
        if state.global_step >= state.max_steps:
            return
        model = kwargs["model"]
        for one in resizing.resize(
            model,
            self._decider.update(observed, _ranks(model)),
            optimizer=kwargs.get("optimizer"),
            generator=self._generator,
        ):
            reason = self._decider.reasons[one.name]
            change = RankChange(
                state.global_step, one.name, one.before, one.after, reason, one.error
            )
            self.changes.append(change)
            if self._changed is not None:
                self._changed(change)


class LossRankCallback(_RankCallback):
    """Changes ranks by the loss curve.

    Args:
        decider: The judge.
        source: Whose loss: ``eval``, at each evaluation, or ``train``, at each log.
        seed: Of new rows.
        changed: Called with each change when it has happened.
    """

    def __init__(
        self,
        decider: LossCurve,
        *,
        source: Literal["eval", "train"] = "eval",
        seed: int = 0,
        changed: Callable[[RankChange], None] | None = None,
    ) -> None:
        super().__init__(decider, seed=seed, changed=changed)
        self._source = source

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._source == "eval" and "eval_loss" in kwargs["metrics"]:
            self._take(float(kwargs["metrics"]["eval_loss"]), state, kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._source == "train" and "loss" in kwargs["logs"]:
            self._take(float(kwargs["logs"]["loss"]), state, kwargs)


class GradientRankCallback(_RankCallback):
    """Changes ranks by the spectrum of the gradients.

    Args:
        decider: The judge.
        every: Optimizer steps from one look at the gradients to the next; a look costs about as
            much as LoRA layers of rank ``columns``.
        columns: Width of the gradients' sketches; at least the decider's largest rank.
        seed: Of new rows.
        changed: Called with each change when it has happened.
    """

    def __init__(
        self,
        decider: GradientSpectrum,
        *,
        every: int = 10,
        columns: int = 128,
        seed: int = 0,
        changed: Callable[[RankChange], None] | None = None,
    ) -> None:
        super().__init__(decider, seed=seed, changed=changed)
        if every < 1 or columns < 1:
            raise UserError(f"every and columns are at least 1, not {every} and {columns}")
        self._every = every
        self._columns = columns
        self._sketches: GradientSketches | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0:
            found = layers.lora_layers(kwargs["model"])
            self._sketches = GradientSketches(found, self._columns)
            self._sketches.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._sketches is None:
            return
        gradients, self._sketches = self._sketches.stop(), None
        self._take(gradients, state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._sketches is not None:
            self._sketches.stop()
            self._sketches = None


class MonitorCallback(TrainerCallback):
    """Gathers the monitor's readings, with the gradients of an optimizer step after clipping.

    Args:
        gathered: Where they go.
        every: Optimizer steps from one reading to the next.
    """

    def __init__(self, gathered: Monitor, *, every: int = 10) -> None:
        if every < 1:
            raise UserError(f"every is at least 1, not {every}")
        self._gathered = gathered
        self._every = every

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0:
            self._gathered.record(monitor.read(kwargs["model"], state.global_step))


def _ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.r["default"] for name, layer in layers.lora_layers(model).items()}
