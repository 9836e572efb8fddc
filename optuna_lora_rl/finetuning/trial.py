"""A study's fine-tuner: prepared once, then one run for each trial."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.evaluation import Questions
from optuna_lora_rl.finetuning.evaluation import generated
from optuna_lora_rl.finetuning.evaluation import quality
from optuna_lora_rl.finetuning.evaluation import teacher_forced
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.once import digest
from optuna_lora_rl.finetuning.once import once
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.progress import Progress
from optuna_lora_rl.finetuning.progress import Report
from optuna_lora_rl.vocabulary import TARGET_PRESETS
from optuna_lora_rl.vocabulary import Value

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from peft import LoraConfig

    from optuna_lora_rl.finetuning.architecture import LinearModule
    from optuna_lora_rl.finetuning.cost import Estimate
    from optuna_lora_rl.finetuning.lora import Adapter
    from optuna_lora_rl.finetuning.preparation import Prepared
    from optuna_lora_rl.finetuning.price import Measured
    from optuna_lora_rl.finetuning.price import Price
    from optuna_lora_rl.finetuning.sft import OnEvaluation
    from optuna_lora_rl.finetuning.stages import Stages

__all__ = ["FineTuner", "FineTuningError", "Report", "Run", "TrialResult"]


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
        curve: Every evaluation: step, epoch, metrics, quality and the score as reported, which
            charges the counted cost of the whole run.
        steps: Optimizer steps done.
        seconds: Wall time of the run.
        peak_memory_bytes: Measured peak: CUDA's allocation, or the process's resident memory.
        flops: Counted FLOPs of training.
        bytes: Counted bytes at the peak.
        trainable_parameters: Parameters that were trained.
        stopped_early: Whether early stopping ended the run.
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


@dataclass(frozen=True)
class Run:
    """One run that is wanted.

    Attributes:
        number: The trial's number, for notes.
        configuration: Its parameters; those left out have their defaults.
        seed: Of initialisation, dropout and order; ``training.seed`` if None.
        report: Called at every evaluation; what it raises ends the run.
        folder: Where the adapter is saved in PEFT format; not saved if None.
        trackers_name: The run's name in trackers.
    """

    number: int
    configuration: Mapping[str, Value]
    seed: int | None = None
    report: Report | None = None
    folder: Path | None = None
    trackers_name: str | None = None


class FineTuner:
    """Fine-tunes LoRA adapters of one base model on one data set, one run for each trial.

    Loading is put off to the first use; then the base model is loaded once and the data is
    tokenised once, and each run leaves both as it found them.

    Args:
        model: The base model.
        data: The examples.
        training: How every run trains.
        objective: What is maximised.
        target_sets: The user's own lists of module names, by name.
        cache: Folder for what is made once (tokens, the untuned model's evaluation, the reference
            run); without it, it is made once in each process.

    Example:
        >>> tuner = FineTuner(
        ...     ModelOptions(), DataOptions(train="tiny:dates-small"),
        ...     TrainingOptions(), ObjectiveOptions(),
        ... )
        >>> result = tuner.run({"lora_rank": 4, "max_steps": 20})
        >>> result.score == result.quality - 0.1 * result.cost
        True
    """

    def __init__(
        self,
        model: ModelOptions,
        data: DataOptions,
        training: TrainingOptions,
        objective: ObjectiveOptions,
        *,
        target_sets: Mapping[str, Sequence[str]] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.training = training
        self.objective = objective
        self.target_sets = dict(target_sets or {})
        self.cache = cache

    def prepare(self) -> None:
        """Loads model and data and checks what can be checked before any trial.

        Raises:
            UserError: When the model or the data cannot be had, or do not fit the options.
        """
        from optuna_lora_rl.finetuning import sft
        from optuna_lora_rl.finetuning.targets import select

        architecture = self._prepared.base.architecture
        for name in self.target_sets:
            if name in TARGET_PRESETS:
                raise UserError(f"target_sets.{name} is the name of a preset; take another name")
            select(architecture, name, "all", self.target_sets)
        try:
            sft.check(self._price.reference_configuration, self.training)
            _ = self._price.reference
        except FineTuningError as error:
            raise UserError(f"objective.reference: {error.message}") from None

    def traits(self) -> dict[str, int | float]:
        """Returns what there is to learn from and with: sizes of data and model, rows left out."""
        splits, tokens = self._prepared.splits, self._prepared.tokens
        lengths, architecture = self._prepared.lengths, self._prepared.base.architecture
        return {
            "train_examples": len(tokens.train),
            "validation_examples": len(tokens.validation),
            "test_examples": 0 if tokens.test is None else len(tokens.test),
            "overlapping_examples": splits.overlapping,
            "blank_examples": splits.blank,
            "unlearnable_examples": tokens.unlearnable,
            "mean_tokens": sum(lengths) / len(lengths),
            "longest_tokens": max(lengths),
            "model_parameters": architecture.parameters,
            "model_layers": architecture.layers,
            "hidden_size": architecture.hidden,
            "vocabulary": architecture.vocabulary,
        }

    def baseline(self) -> Evaluation:
        """Returns the untuned model's evaluation on the validation set, measured once."""
        return self._baseline

    def estimate(self, configuration: Mapping[str, Value]) -> tuple[Estimate, dict[str, float]]:
        """Counts a whole run without doing it, and returns it with its ``cost_parts``.

        Raises:
            FineTuningError: When there is nothing that the configuration could adapt.
        """
        counted = self._price.estimate(Configuration.of(configuration))
        return counted, self._price.estimated(counted)

    def run(
        self,
        configuration: Mapping[str, Value],
        *,
        seed: int | None = None,
        report: Report | None = None,
        folder: Path | None = None,
        trackers_name: str | None = None,
    ) -> TrialResult:
        """Trains and evaluates one adapter.

        Args:
            configuration: The trial's parameters; those left out have their defaults.
            seed: Of initialisation, dropout and order; ``training.seed`` if left out.
            report: Called at every evaluation; what it raises comes out of ``run``, after the
                base model was restored.
            folder: Where the adapter is saved in PEFT format; not saved if left out.
            trackers_name: The run's name in trackers.

        Raises:
            FineTuningError: When the trial failed by itself.
        """
        return self._alone(Run(0, configuration, seed, report, folder, trackers_name))

    def run_packed(
        self,
        runs: Callable[[], Run | None],
        done: Callable[[Run, TrialResult | Exception], None],
        *,
        size: int | None = None,
        says: Callable[[str], None] | None = None,
    ) -> None:
        """Trains and evaluates adapters side by side, over one forward pass of the base model.

        Each run gives what it gives alone, to float tolerance. What cannot be packed runs alone,
        while the others wait. All functions are called in the caller's thread, one at a time.

        Args:
            runs: Called whenever a place is free; None for "nothing now", asked again when a
                run has ended.
            done: Called as each run ends, with its result, a ``FineTuningError``, or what its
                report raised.
            size: Most runs side by side; what memory seems to hold if left out.
            says: Told in a sentence why a run is alone, and when the pack becomes smaller.

        Raises:
            BaseException: What ``runs`` and ``done`` raise, and what is no ``Exception`` from a
                report; all runs are ended.
        """
        from optuna_lora_rl.finetuning.side_by_side import SideBySide

        SideBySide(self, runs, done, says or (lambda note: None)).run(size)

    def _alone(self, run: Run) -> TrialResult:
        wanted = Configuration.of(run.configuration)
        return self._result(wanted, *self._followed(wanted, run))

    def _result(
        self, wanted: Configuration, progress: Progress, steps: int, took: Measured
    ) -> TrialResult:
        run = self._price.estimate(wanted, steps)
        parts = {"estimated": self._price.estimated(run)}
        if self.objective.cost_source == "measured":
            parts["measured"] = self._price.measured(took, self._measured_reference, run)
        total = parts[self.objective.cost_source]["total"]
        gained = progress.curve[-1]["quality"]
        return TrialResult(
            quality=gained,
            score=gained - self.objective.cost_weight * total,
            cost=total,
            cost_parts=parts,
            metrics=progress.values,
            curve=progress.curve,
            steps=steps,
            seconds=took.seconds,
            peak_memory_bytes=took.peak_bytes,
            flops=run.flops,
            bytes=run.memory_bytes,
            trainable_parameters=run.trainable_parameters,
            stopped_early=progress.stopped_early,
        )

    def test(self, adapter: Path) -> Evaluation | None:
        """Evaluates a saved adapter on the test split, or returns None where there is none.

        No trial looks at the split, which is tokenised with the others; call this once, for the
        final best.
        """
        from optuna_lora_rl.finetuning.lora import loaded
        from optuna_lora_rl.finetuning.preparation import questions
        from optuna_lora_rl.finetuning.quiet import quiet

        prepared = self._prepared
        base, rows, dataset = prepared.base, prepared.splits.test, prepared.tokens.test
        if rows is None or dataset is None:
            return None
        asked = questions(base, rows, self.data, self.objective)
        before = Evaluation(**self._evaluate_base(dataset, asked))
        with quiet(), loaded(base.model, adapter) as adapted:
            after = Evaluation(**self._evaluate(adapted, dataset, asked))
        gained = quality(self.objective.metric, after.metrics(), before)
        return replace(after, quality=gained)

    @cached_property
    def _prepared(self) -> Prepared:
        from optuna_lora_rl.finetuning.preparation import prepare

        return prepare(self.model, self.data, self.training, self.objective, cache=self.cache)

    @cached_property
    def _price(self) -> Price:
        from optuna_lora_rl.finetuning.price import Price

        return Price(
            self._prepared, self.model.dtype, self.training, self.objective, self.target_sets
        )

    @cached_property
    def _baseline(self) -> Evaluation:
        return self._untuned(self._prepared.tokens.validation, self._prepared.asked)

    def _untuned(self, dataset: Dataset, asked: Questions | None) -> Evaluation:
        def measure() -> dict[str, float]:
            return self._evaluate_base(dataset, asked)

        return Evaluation(**once(self.cache, "baselines", self._facts(dataset, asked), measure))

    @cached_property
    def _stages(self) -> Stages:
        from optuna_lora_rl.finetuning.stages import Stage
        from optuna_lora_rl.finetuning.stages import Stages

        tokens, asked = self._prepared.tokens, self._prepared.asked
        whole = Stage(tokens.validation, asked, self._baseline)
        return Stages(whole, self.training.first_evaluation, self._untuned)

    @cached_property
    def _measured_reference(self) -> Measured:
        from optuna_lora_rl.finetuning.price import Measured

        configuration = self._price.reference_configuration
        facts = {
            **self._facts(self._prepared.tokens.validation, self._prepared.asked),
            "configuration": asdict(configuration),
            "train": _hash(self._prepared.tokens.train),
            "machine": [platform.node(), platform.processor()],
        }

        def measure() -> dict[str, float]:
            return asdict(self._followed(configuration, Run(0, {}))[2])

        return Measured(**once(self.cache, "references", facts, measure))  # type: ignore[arg-type]

    def _followed(self, configuration: Configuration, run: Run) -> tuple[Progress, int, Measured]:
        """Trains an adapter; returns its progress, the steps done and what it took."""
        from optuna_lora_rl.finetuning.isolation import collected
        from optuna_lora_rl.finetuning.isolation import failures
        from optuna_lora_rl.finetuning.isolation import own_randomness
        from optuna_lora_rl.finetuning.lora import attached
        from optuna_lora_rl.finetuning.measured import Meter
        from optuna_lora_rl.finetuning.price import Measured
        from optuna_lora_rl.finetuning.quiet import quiet

        config, chosen = self._checked(configuration)
        in_place: list[Adapter] = []
        progress = self._progress(configuration, run.report, in_place)
        meter = Meter(self._prepared.device)
        base = self._prepared.base.model
        try:
            with quiet(), failures(progress.is_callers), own_randomness(self._seed(run)):
                with meter, collected(), attached(base, config, chosen) as adapter:
                    in_place.append(adapter)
                    steps = self._fit(adapter, configuration, run, progress.evaluated)
        finally:
            in_place.clear()
            self._release()
        return progress, steps, Measured(meter.seconds, meter.peak_bytes)

    def _checked(
        self, configuration: Configuration
    ) -> tuple[LoraConfig, tuple[LinearModule, ...]]:
        """Returns a configuration in PEFT's words, and the modules that it adapts."""
        from optuna_lora_rl.finetuning import sft
        from optuna_lora_rl.finetuning.lora import lora_config
        from optuna_lora_rl.finetuning.lora import targets_of

        architecture = self._prepared.base.architecture
        sft.check(configuration, self.training)
        chosen = targets_of(configuration, architecture, self.target_sets)
        return lora_config(configuration, architecture, chosen), chosen

    def _seed(self, run: Run) -> int:
        return self.training.seed if run.seed is None else run.seed

    def _progress(
        self, configuration: Configuration, report: Report | None, in_place: list[Adapter]
    ) -> Progress:
        from optuna_lora_rl.finetuning.sft import Plan

        price = self._price
        total = price.estimated(price.estimate(configuration))["total"]
        plan = Plan.of(configuration, self.training, len(self._prepared.lengths))
        stages = self._stages.of(plan.evaluated)
        return Progress(
            metric=self.objective.metric,
            baselines={step: stage.baseline for step, stage in stages.items()},
            charge=self.objective.cost_weight * total,
            steps=plan.steps,
            patience=self.training.early_stopping_patience,
            generate=lambda step: self._generated(in_place[0].model, stages[step].asked),
            report=report,
        )

    def _fit(
        self,
        adapter: Adapter,
        configuration: Configuration,
        run: Run,
        on_evaluation: OnEvaluation,
        after_backward: Callable[[], None] | None = None,
    ) -> int:
        from optuna_lora_rl.finetuning import sft

        prepared = self._prepared
        if adapter.trainable_parameters == 0:
            raise FineTuningError("error", "nothing of the adapter is trainable")
        plan = sft.Plan.of(configuration, self.training, len(prepared.lengths))
        stages = self._stages.of(plan.evaluated)
        steps = sft.train(
            adapter.model,
            prepared.base.tokenizer,
            prepared.tokens.train,
            {step: stage.dataset for step, stage in stages.items()},
            configuration,
            plan,
            self.training,
            device=prepared.device,
            seed=self._seed(run),
            folder=run.folder or Path("runs"),
            run_name=run.trackers_name,
            on_evaluation=on_evaluation,
            after_backward=after_backward,
        )
        if not adapter.changed():
            rate = configuration.learning_rate
            raise FineTuningError("error", f"training left the adapter as it was (at rate {rate})")
        if run.folder is not None:
            adapter.save(run.folder)
        return steps

    def _release(self) -> None:
        if self._prepared.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        if {"deepspeed", "fsdp"} & set(self.training.extra):
            # Sharding takes the model apart for good: the next trial needs a fresh one.
            for name in ("_prepared", "_price", "_stages"):
                self.__dict__.pop(name, None)

    def _evaluate_base(self, dataset: Dataset, asked: Questions | None) -> dict[str, float]:
        from optuna_lora_rl.finetuning.isolation import own_randomness
        from optuna_lora_rl.finetuning.lora import restored

        base = self._prepared.base.model
        with own_randomness(), restored(base, {}):
            return self._evaluate(base, dataset, asked)

    def _evaluate(self, model: Any, dataset: Dataset, asked: Questions | None) -> dict[str, float]:
        from optuna_lora_rl.finetuning import sft
        from optuna_lora_rl.finetuning.quiet import quiet

        prepared = self._prepared
        with quiet():
            metrics = sft.evaluate(
                model, prepared.base.tokenizer, dataset, self.training, device=prepared.device
            )
            return {**teacher_forced(metrics), **self._generated(model, asked)}

    def _generated(self, model: Any, asked: Questions | None) -> dict[str, float]:
        if asked is None:
            return {}
        return generated(
            model,
            self._prepared.base.tokenizer,
            asked,
            max_new_tokens=self.objective.max_new_tokens,
            batch_size=self.training.eval_batch_size,
        )

    def _facts(self, dataset: Dataset, asked: Questions | None) -> dict[str, Any]:
        """Returns all that an evaluation of the untuned model depends on."""
        import torch
        import transformers

        prepared = self._prepared
        return {
            "model": prepared.base.fingerprint,
            "device": prepared.device.type,
            "versions": [torch.__version__, transformers.__version__],
            "training": self.training.model_dump(mode="json", exclude={"report_to", "seed"}),
            "validation": _hash(dataset),
            "asked": None if asked is None else [asdict(asked), self.objective.max_new_tokens],
        }


def _hash(dataset: Dataset) -> str:
    return digest(json.dumps([dataset["input_ids"][:], dataset["labels"][:]]))
