"""The course of one run: checked and planned before it starts, then followed to its result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path

from transformers import TrainerCallback

from optuna_lora_rl.finetuning import questions as evaluation
from optuna_lora_rl.finetuning import rank_change
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.lora import Adapter
from optuna_lora_rl.finetuning.lora import OwnStart
from optuna_lora_rl.finetuning.lora import attached
from optuna_lora_rl.finetuning.lora import lora_config
from optuna_lora_rl.finetuning.lora import targets_of
from optuna_lora_rl.finetuning.measured import Meter
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.progress import Progress
from optuna_lora_rl.finetuning.progress import Report
from optuna_lora_rl.finetuning.quiet import quiet
from optuna_lora_rl.finetuning.run import Run
from optuna_lora_rl.finetuning.run import TrialResult
from optuna_lora_rl.finetuning.shared import Shared
from optuna_lora_rl.finetuning.trackers import Follower
from optuna_lora_rl.rank import truncation
from optuna_lora_rl.rank.callback import MonitorCallback
from optuna_lora_rl.rank.monitor import Monitor

_log = logging.getLogger(__name__)


class Course:
    """One run from its parameters to its result.

    Making it checks the configuration, and measures the untuned model where an evaluation of the
    run will read what none has read before; nothing is trained yet.

    Args:
        shared: What all runs share.
        run: What is asked.
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
        shared: Shared,
        run: Run,
        report: Report | None = None,
        follower: Follower | None = None,
    ) -> None:
        self._shared = shared
        self._follower = follower
        self._run = run
        self._adapter: Adapter | None = None
        self._steps = 0
        self._truncation: dict[str, float] = {}
        self.wanted = Configuration.of(run.configuration)
        prepared, training = shared.prepared, shared.training
        self.seed = training.seed if run.seed is None else run.seed
        sft.check(self.wanted, training)
        self.chosen = targets_of(self.wanted, prepared.base.architecture, shared.target_sets)
        self._allocated = shared.allocator.share(self.wanted, self.chosen, run.on_activity)
        self._ranks = dict(self._allocated.ranks)
        self._values: dict[str, float] = {}
        self._changing = rank_change.callback(
            self.wanted.rank_change,
            training.rank_change,
            self.seed,
            {module.name: module.inputs + module.outputs for module in self.chosen},
            lambda change: _log.info("trial %d, %s", run.number, change),
        )
        base = prepared.base
        self.config = lora_config(
            self.wanted, base.architecture, self.chosen, self._allocated.ranks, base.revision
        )
        self.start = OwnStart.of(self.wanted, self.seed)
        self.callbacks: list[TrainerCallback] = []
        self._plan = sft.Plan.of(self.wanted, training, len(prepared.lengths))
        self._stages = shared.stages.of(self._plan.evaluated)
        self._monitor = Monitor()
        self._counted = shared.price.estimated(shared.price.estimate(self.wanted))["total"]
        self.progress = Progress(
            metric=shared.objective.metric,
            numbers=self._plan.evaluated,
            baselines={step: stage.baseline for step, stage in self._stages.items()},
            charge=shared.objective.cost_weight * self._counted,
            steps=self._plan.steps,
            patience=training.early_stopping_patience,
            generate=self._generated,
            report=report or run.report,
        )

    def alone(self) -> Measured:
        """Trains on the shared base model itself, and returns what that took.

        Raises:
            FineTuningError: When the run failed by itself.
            Exception: What the report raised.
        """
        prepared = self._shared.prepared
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
        shared, run, wanted = self._shared, self._run, self.wanted
        prepared, call = shared.prepared, shared.prepared.base.call
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
            shared.training,
            device=prepared.device,
            seed=self.seed,
            folder=run.folder or Path("runs"),
            run_name=run.trackers_name,
            on_evaluation=self.progress.evaluated,
            after_backward=after_backward,
            callbacks=[*self.callbacks, *self._callbacks()],
            log_every=shared.training.rank_change.loss.every
            if wanted.rank_change == "loss"
            else None,
            merges=adapter.has_base,
            follower=self._follower,
            # In a pack the base model takes all runs' batches together, padded to one length, and
            # gives back nothing but hidden states.
            call=call if adapter.has_base else replace(call, end_to_end=False, few=False),
            on_activity=run.on_activity,
        )
        if not adapter.changed():
            rate = wanted.learning_rate
            raise FineTuningError("error", f"training left the adapter as it was (at rate {rate})")
        if self._stages[self._steps] is not self._stages[self._plan.steps]:
            # Stopped early, and others' last evaluation reads everything.
            values = self._evaluated(adapter)
            self.progress.ended(values, shared.baseline)
        if self._changing is not None and self._changing.changes:
            self._ranks = self._spells()[-1][1]
        if wanted.truncates:
            self._truncate(adapter)
        if run.folder is not None:
            adapter.save(run.folder, prepared.base.tokenizer)

    def _callbacks(self) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [] if self._changing is None else [self._changing]
        training = self._shared.training
        if training.monitor:
            every = math.ceil(self._plan.steps / training.monitor)
            found.append(MonitorCallback(self._monitor, every=every))
        return found

    def _truncate(self, adapter: Adapter) -> None:
        """Cuts the trained adapter, and evaluates what is left on the whole validation set."""
        shared, wanted = self._shared, self.wanted
        done = truncation.truncate_attached(
            adapter.model,
            energy=wanted.truncate_energy if wanted.truncate_energy < 1 else None,
            rank=wanted.truncate_rank or None,
        )
        before = self.progress.curve[-1]["quality"]
        after = before
        if done.after != done.before:
            self._values = self._evaluated(adapter)
            after = evaluation.quality(shared.objective.metric, self._values, shared.baseline)
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
        self._shared.release()

    def result(
        self, took: Measured, reference: Callable[[], Measured] | None = None
    ) -> TrialResult:
        """Returns what the run gave and cost.

        Args:
            took: What it took.
            reference: Gives what the reference run took, where the objective's cost is measured.
        """
        shared, progress = self._shared, self.progress
        changes = [] if self._changing is None else self._changing.changes
        run = shared.price.estimate(self.wanted, self._steps)
        if changes:
            run = shared.price.followed(self.wanted, self._spells())
        parts = {"estimated": shared.price.estimated(run)}
        if reference is not None:
            whole = replace(took, seconds=took.seconds + self._allocated.seconds)
            parts["measured"] = shared.price.measured(whole, reference(), run)
        total = parts[shared.objective.cost_source]["total"]
        gained = self._truncation.get("quality_after", progress.curve[-1]["quality"])
        return TrialResult(
            quality=gained,
            score=gained - shared.objective.cost_weight * total,
            cost=total,
            cost_parts=parts,
            metrics=self._values or progress.values,
            curve=progress.curve,
            steps=self._steps,
            seconds=took.seconds,
            peak_memory_bytes=took.peak_bytes,
            flops=run.flops,
            bytes=run.memory_bytes,
            trainable_parameters=run.trainable_parameters,
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
        share = self._plan.evaluated[int(row["step"])] / self._shared.training.evaluations
        spent = share * self._counted
        return {"score": row["score"], "quality": row["quality"], "cost": spent}

    def _spells(self) -> list[tuple[int, dict[str, int]]]:
        start = {module.name: self.wanted.lora_rank for module in self.chosen}
        changes = [] if self._changing is None else self._changing.changes
        return rank_change.spells({**start, **self._allocated.ranks}, changes, self._steps)

    def _evaluated(self, adapter: Adapter) -> dict[str, float]:
        shared, tell = self._shared, self._run.on_activity
        asked = shared.prepared.asked
        return shared.evaluate(adapter.model, shared.validation, asked, on_activity=tell)

    def _generated(self, step: int) -> dict[str, float]:
        model = None if self._adapter is None else self._adapter.model
        return self._shared.generated(model, self._stages[step].asked, self._run.on_activity)
