"""The course of one run: checked and planned before it starts, then followed to its result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.finetuning import evaluation
from optuna_lora_rl.finetuning import ranks
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import Adapter
from optuna_lora_rl.finetuning.lora import OwnStart
from optuna_lora_rl.finetuning.lora import attached
from optuna_lora_rl.finetuning.lora import lora_config
from optuna_lora_rl.finetuning.lora import targets_of
from optuna_lora_rl.finetuning.price import Adapted
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.price import Meter
from optuna_lora_rl.finetuning.progress import Progress
from optuna_lora_rl.finetuning.progress import Report
from optuna_lora_rl.finetuning.trackers import Follower
from optuna_lora_rl.finetuning.workspace import Workspace
from optuna_lora_rl.rank import truncation
from optuna_lora_rl.rank.callback import MonitorCallback
from optuna_lora_rl.rank.monitor import Monitor
from optuna_lora_rl.vocabulary import Value


@dataclass(frozen=True)
class TrialResult:
    """What one run gave and cost.

    Attributes:
        quality: Gain over the untuned model in the objective's metric, of the saved adapter.
        score: ``quality - cost_weight * cost``.
        cost: Weighted cost relative to the reference configuration, which has 1; counted or
            measured, as ``cost_source`` says, for the steps that were done.
        cost_parts: ``"estimated"`` and, where the reference was measured, ``"measured"``: each
            has the relative ``time``, ``memory`` and ``parameters`` and their weighted ``total``.
        metrics: The last evaluation, by name.
        curve: Every evaluation: step, epoch, metrics, quality, the score as reported, which
            charges the counted cost of the whole run, ``train_loss``, the mean training loss
            since the evaluation before, and ``untuned_loss``, the untuned model's on what this
            one read.
        steps: Optimizer steps done.
        seconds: Wall time of the run.
        peak_memory_bytes: Measured peak: CUDA's allocation, or the process's resident memory.
        flops: Counted FLOPs of training.
        bytes: Counted bytes at the peak.
        trainable_parameters: Parameters that were trained.
        stopped_early: Whether early stopping ended the run.
        ranks: Ranks by layer of the saved adapter; empty where all have ``lora_rank``.
        rank_changes: Where ranks changed in training, each change: ``step`` (steps done before
            it), ``layer``, ``before``, ``after``, ``reason``, and ``error``, what of the update a
            smaller rank lost. ``trainable_parameters`` are then the most there were.
        truncation: Where the adapter was cut after training: ``quality`` and ``parameters`` of
            its factors, each ``_before`` and ``_after``, the ``largest_rank`` that is left and
            the ``largest_error``, of a layer's update in Frobenius norm, relative to the update.
        monitor: What was read of the layers in training: ``course``, a row a reading, ``layers``,
            a row a layer, and ``suggestions``; empty where nothing was read. See
            :meth:`optuna_lora_rl.rank.monitor.Monitor.summary`.
    """

    quality: float
    score: float
    cost: float
    cost_parts: dict[str, dict[str, float]]
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    steps: int
    seconds: float
    peak_memory_bytes: int
    flops: float
    bytes: float
    trainable_parameters: int
    stopped_early: bool
    ranks: dict[str, int] = field(default_factory=dict)
    rank_changes: list[dict[str, int | float | str]] = field(default_factory=list)
    truncation: dict[str, float] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRequest:
    """One run that is wanted.

    Attributes:
        number: The trial's number, for notes.
        configuration: Its parameters; those left out have their defaults.
        seed: Of initialisation, dropout and order; ``training.seed`` if None.
        report: Called at every evaluation; what it raises ends the run.
        folder: Where the adapter is saved in PEFT format; not saved if None.
        trackers_name: The run's name in trackers.
        on_activity: Told what the run does, step by step.
    """

    number: int
    configuration: Mapping[str, Value]
    seed: int | None = None
    report: Report | None = None
    folder: Path | None = None
    trackers_name: str | None = None
    on_activity: OnActivity = unseen


_log = logging.getLogger(__name__)


class Trial:
    """One run from its parameters to its result.

    Making it checks the configuration, and measures the untuned model where an evaluation of the
    run will read what none has read before; nothing is trained yet.

    Args:
        workspace: What all runs share.
        request: What is asked.
        report: Called instead of the run's own function.
        follower: Knows the trackers that follow the run; None for none.

    Attributes:
        wanted: The configuration.
        chosen: The modules that it adapts.
        config: The same in PEFT's words.
        start: The adapter's initialisation, where PEFT has it not.
        progress: The evaluations so far.
        callbacks: Further callbacks of the trainer.
        seed: Of initialisation, dropout and order.

    Raises:
        FineTuningError: When the configuration cannot be had.
    """

    def __init__(
        self,
        workspace: Workspace,
        request: TrialRequest,
        report: Report | None = None,
        follower: Follower | None = None,
    ) -> None:
        self._workspace = workspace
        self._follower = follower
        self._request = request
        self._adapter: Adapter | None = None
        self._steps = 0
        self._truncation: dict[str, float] = {}
        self.wanted = Configuration.of(request.configuration)
        prepared, training = workspace.prepared, workspace.training
        self.seed = training.seed if request.seed is None else request.seed
        sft.check(self.wanted, training)
        self.chosen = targets_of(self.wanted, prepared.base.architecture, workspace.target_sets)
        self._allocated = workspace.allocator.share(self.wanted, self.chosen, request.on_activity)
        self._ranks = dict(self._allocated.ranks)
        self._values: dict[str, float] = {}
        self._changing = ranks.changing_callback(
            self.wanted.rank_change,
            training.rank_change,
            self.seed,
            {module.name: module.inputs + module.outputs for module in self.chosen},
            lambda change: _log.info("trial %d, %s", request.number, change),
        )
        base = prepared.base
        self.config = lora_config(
            self.wanted, base.architecture, self.chosen, self._allocated.ranks, base.revision
        )
        self.start = OwnStart.of(self.wanted, self.seed)
        self.callbacks: list[TrainerCallback] = []
        self._plan = sft.Plan.of(self.wanted, training, len(prepared.lengths))
        self._stages = workspace.stages.of(self._plan.evaluated)
        self._monitor = Monitor()
        self._adapted = Adapted(self.chosen, self._allocated)
        counted = workspace.price.estimate(self.wanted, self._adapted)
        self._counted = workspace.price.estimated(counted)["total"]
        self.progress = Progress(
            metric=workspace.objective.metric,
            numbers=self._plan.evaluated,
            baselines={step: stage.baseline for step, stage in self._stages.items()},
            charge=workspace.objective.cost_weight * self._counted,
            steps=self._plan.steps,
            patience=training.early_stopping_patience,
            generate=self._generated,
            report=report or request.report,
        )

    def alone(self) -> Measured:
        """Trains on the shared base model itself, and returns what that took.

        Raises:
            FineTuningError: When the run failed by itself.
            Exception: What the report raised.
        """
        prepared = self._workspace.prepared
        meter = Meter(prepared.device)
        try:
            with quiet(), failures(self.progress.is_callers), own_randomness(self.seed):
                with meter, collected():
                    base = prepared.base.model
                    with attached(base, self.config, self.chosen, self.start) as adapter:
                        self.train(adapter)
        finally:
            self.close()
        return Measured(meter.seconds, meter.peak_bytes)

    def train(self, adapter: Adapter, after_backward: Callable[[], None] | None = None) -> None:
        """Trains, evaluates and saves an adapter that is in its place.

        Raises:
            FineTuningError: When there is nothing to train, or training moved nothing.
        """
        workspace, request, wanted = self._workspace, self._request, self.wanted
        prepared, call = workspace.prepared, workspace.prepared.base.call
        if adapter.trainable_parameters == 0:
            raise FineTuningError("error", "nothing of the adapter is trainable")
        self._adapter = adapter
        self._steps = sft.train(
            adapter.model,
            prepared.base.tokenizer,
            prepared.tokens.train,
            {step: stage.dataset for step, stage in self._stages.items()},
            wanted,
            self._plan,
            workspace.training,
            device=prepared.device,
            seed=self.seed,
            folder=request.folder or Path("runs"),
            run_name=request.trackers_name,
            on_evaluation=self.progress.evaluated,
            after_backward=after_backward,
            callbacks=[*self.callbacks, *self._callbacks()],
            log_every=workspace.training.rank_change.loss.every
            if wanted.rank_change == "loss"
            else None,
            merges=adapter.has_base,
            follower=self._follower,
            # In a pack the base model takes all runs' batches together, padded to one length, and
            # gives back nothing but hidden states.
            call=call if adapter.has_base else replace(call, end_to_end=False, few=False),
            on_activity=request.on_activity,
        )
        if not adapter.changed():
            rate = wanted.learning_rate
            raise FineTuningError("error", f"training left the adapter as it was (at rate {rate})")
        if self._stages[self._steps] is not self._stages[self._plan.steps]:
            # Stopped early, and others' last evaluation reads everything.
            values = self._evaluated(adapter)
            self.progress.ended(values, workspace.baseline)
        if self._changing is not None and self._changing.changes:
            self._ranks = self._spells()[-1][1]
        if wanted.truncates:
            self._truncate(adapter)
        if request.folder is not None:
            adapter.save(request.folder, prepared.base.tokenizer)

    def _callbacks(self) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [] if self._changing is None else [self._changing]
        training = self._workspace.training
        if training.monitor:
            every = math.ceil(self._plan.steps / training.monitor)
            found.append(MonitorCallback(self._monitor, every=every))
        return found

    def _truncate(self, adapter: Adapter) -> None:
        """Cuts the trained adapter, and evaluates what is left on the whole validation set."""
        workspace, wanted = self._workspace, self.wanted
        done = truncation.truncate_attached(
            adapter.model,
            energy=wanted.truncate_energy if wanted.truncate_energy < 1 else None,
            rank=wanted.truncate_rank or None,
        )
        before = self.progress.curve[-1]["quality"]
        after = before
        if done.after != done.before:
            self._values = self._evaluated(adapter)
            after = evaluation.quality(
                workspace.objective.metric, self._values, workspace.baseline
            )
            self._ranks = done.after
        self._truncation = {
            "quality_before": before,
            "quality_after": after,
            "parameters_before": done.parameters_before,
            "parameters_after": done.parameters_after,
            "largest_rank": max(done.after.values()),
            "largest_error": max(done.errors.values()),
        }

    def close(self) -> None:
        """Lets go of the adapter, and of what training took."""
        self._adapter = None
        self._workspace.release()

    def result(
        self, took: Measured, reference: Callable[[], Measured] | None = None
    ) -> TrialResult:
        """Returns what the run gave and cost.

        Args:
            took: What it took.
            reference: Gives what the reference run took, where the objective's cost is measured.
        """
        workspace, progress = self._workspace, self.progress
        changes = [] if self._changing is None else self._changing.changes
        counted = workspace.price.estimate(self.wanted, self._adapted, self._steps)
        if changes:
            counted = workspace.price.followed(self.wanted, self._adapted, self._spells())
        parts = {"estimated": workspace.price.estimated(counted)}
        if reference is not None:
            whole = replace(took, seconds=took.seconds + self._allocated.seconds)
            parts["measured"] = workspace.price.measured(whole, reference(), counted)
        total = parts[workspace.objective.cost_source]["total"]
        gained = self._truncation.get("quality_after", progress.curve[-1]["quality"])
        return TrialResult(
            quality=gained,
            score=gained - workspace.objective.cost_weight * total,
            cost=total,
            cost_parts=parts,
            metrics=self._values or progress.values,
            curve=progress.curve,
            steps=self._steps,
            seconds=took.seconds,
            peak_memory_bytes=took.peak_bytes,
            flops=counted.flops,
            bytes=counted.memory_bytes,
            trainable_parameters=counted.trainable_parameters,
            stopped_early=progress.stopped_early,
            ranks=self._ranks,
            rank_changes=[asdict(change) for change in changes],
            truncation=self._truncation,
            monitor=self._monitor.summary() if self._monitor.history else {},
        )

    def so_far(self) -> dict[str, float]:
        """Returns score and quality of the last evaluation, and its share of the counted cost."""
        if not self.progress.curve:
            return {}
        row = self.progress.curve[-1]
        share = self._plan.evaluated[int(row["step"])] / self._workspace.training.evaluations
        spent = share * self._counted
        return {"score": row["score"], "quality": row["quality"], "cost": spent}

    def _spells(self) -> list[tuple[int, dict[str, int]]]:
        start = {module.name: self.wanted.lora_rank for module in self.chosen}
        changes = [] if self._changing is None else self._changing.changes
        return ranks.spells({**start, **self._allocated.ranks}, changes, self._steps)

    def _evaluated(self, adapter: Adapter) -> dict[str, float]:
        workspace, tell = self._workspace, self._request.on_activity
        asked = workspace.prepared.asked
        return workspace.evaluate(adapter.model, workspace.validation, asked, on_activity=tell)

    def _generated(self, step: int) -> dict[str, float]:
        model = None if self._adapter is None else self._adapter.model
        return self._workspace.generated(
            model, self._stages[step].asked, self._request.on_activity
        )
