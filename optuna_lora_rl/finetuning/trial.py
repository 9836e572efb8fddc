"""A study's fine-tuner: prepared once, then one run for each trial."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import random
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import cost
from optuna_lora_rl.finetuning import evaluation
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.options import FLASH_ATTENTION
from optuna_lora_rl.finetuning.options import GENERATED_METRICS
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.vocabulary import TARGET_PRESETS
from optuna_lora_rl.vocabulary import Value

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from optuna_lora_rl.finetuning.architecture import LinearModule
    from optuna_lora_rl.finetuning.data import Splits
    from optuna_lora_rl.finetuning.evaluation import Questions
    from optuna_lora_rl.finetuning.lora import Adapter
    from optuna_lora_rl.finetuning.model import Base
    from optuna_lora_rl.finetuning.sft import Plan
    from optuna_lora_rl.finetuning.sources import Row
    from optuna_lora_rl.finetuning.tokens import Tokens

# Called at each evaluation with the step, the score the run would have if it ended with this
# quality, and the metrics. It may raise, to end the run.
Report = Callable[[int, float, Mapping[str, float]], None]

__all__ = ["FineTuner", "FineTuningError", "Report", "TrialResult"]


@dataclass(frozen=True)
class TrialResult:
    """What one run gave and cost.

    Attributes:
        quality: Gain over the untuned model in the objective's metric, of the saved adapter.
        score: ``quality - cost_weight * cost``.
        cost: Weighted cost relative to the reference configuration, which has 1.
        cost_parts: ``"estimated"`` and, where the reference was measured, ``"measured"``: each
            has the relative ``time``, ``memory`` and ``parameters`` and their weighted ``total``.
        metrics: The last evaluation, by name.
        curve: Every evaluation: step, epoch, metrics, quality and score.
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
class _Ready:
    base: Base
    splits: Splits
    tokens: Tokens
    lengths: list[int]
    asked: Questions | None
    device: torch.device


@dataclass(frozen=True)
class _Measured:
    seconds: float
    peak_bytes: int


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
        cache: Folder for what is measured once (the untuned model, the reference run); without
            it, it is measured once in each process.

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
        self._baseline: Evaluation | None = None
        self._reference_run: _Measured | None = None

    def prepare(self) -> None:
        """Loads model and data and checks what can be checked before any trial.

        Raises:
            UserError: When the model or the data cannot be had, or do not fit the options.
        """
        ready = self._ready
        from optuna_lora_rl.finetuning.targets import select

        for name in self.target_sets:
            if name in TARGET_PRESETS:
                raise UserError(f"target_sets.{name} is the name of a preset; take another name")
            select(ready.base.architecture, name, "all", self.target_sets)
        try:
            _ = self._reference
        except FineTuningError as error:
            raise UserError(f"objective.reference: {error.message}") from None

    def baseline(self) -> Evaluation:
        """Returns the untuned model's evaluation on the validation set, measured once."""
        if self._baseline is None:
            key = self._key("baseline")
            saved = self._cached("baselines", key)
            if saved is None:
                values = self._evaluate_base(self._ready.tokens.validation, self._ready.asked)
                saved = self._store("baselines", key, values)
            self._baseline = Evaluation(**saved)
        return self._baseline

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
        wanted = Configuration.of(configuration)
        plan = self._plan(wanted)
        progress = _Progress(self, self._full_run(wanted), plan.steps, report)
        steps, meter = self._train(wanted, seed, progress, folder, trackers_name)
        run = self._full_run(wanted, steps)
        estimated = self._relative(run, self._reference)
        parts = {"estimated": estimated}
        if self.objective.cost_source == "measured":
            parts["measured"] = self._relative_measured(meter, run)
        total = parts[self.objective.cost_source]["total"]
        last = progress.curve[-1]
        return TrialResult(
            quality=last["quality"],
            score=last["quality"] - self.objective.cost_weight * total,
            cost=total,
            cost_parts=parts,
            metrics=dict(progress.values),
            curve=progress.curve,
            steps=steps,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_bytes,
            flops=run.flops,
            bytes=run.memory_bytes,
            trainable_parameters=run.trainable_parameters,
            stopped_early=progress.stopped_early,
        )

    def test(self, adapter: Path) -> Evaluation | None:
        """Evaluates a saved adapter on the test split, or returns None where there is none.

        The split is read here only; call it once, for the final best.
        """
        ready = self._ready
        if ready.tokens.test is None or ready.splits.test is None:
            return None
        from optuna_lora_rl.finetuning import lora

        asked = self._questions(ready.base, ready.splits.test)
        before = Evaluation(**self._evaluate_base(ready.tokens.test, asked))
        with lora.loaded(ready.base.model, adapter) as adapted:
            values = self._evaluate(adapted, ready.tokens.test, asked)
        found = Evaluation(**values)
        return replace(
            found, quality=evaluation.quality(self.objective.metric, found.metrics(), before)
        )

    # -- preparation ---------------------------------------------------------------------------

    @cached_property
    def _ready(self) -> _Ready:
        from optuna_lora_rl.finetuning import data
        from optuna_lora_rl.finetuning import model
        from optuna_lora_rl.finetuning import tokens
        from optuna_lora_rl.finetuning.quiet import quiet

        with quiet(), _own_randomness():
            splits = data.load(self.data)
            if self.objective.metric in GENERATED_METRICS and splits.kind == "text":
                raise UserError(
                    f"objective.metric: {self.objective.metric} compares answers, but text "
                    "examples ask nothing; take loss or token_accuracy, or prompt/completion data"
                )
            device = model.device_of(self.training.use_cpu)
            self._check_device(device)
            base = model.load(self.model, device)
            made = tokens.tokenise(
                splits,
                base,
                self.data.model_copy(update={"max_length": self._longest(base)}),
                self.training,
                use_cpu=device.type == "cpu",
            )
            asked = self._questions(base, splits.validation)
        return _Ready(base, splits, made, made.lengths, asked, device)

    def _check_device(self, device: torch.device) -> None:
        training = self.training
        if training.packing and self.model.attn_implementation not in FLASH_ATTENTION:
            raise UserError(
                "training.packing needs model.attn_implementation flash_attention_2: with any "
                "other kernel packed examples attend to each other"
            )
        if device.type == "cpu" and (training.packing or training.precision == "fp16"):
            key = "packing" if training.packing else "precision fp16"
            raise UserError(f"training.{key} needs a GPU, and there is none")

    def _longest(self, base: Base) -> int:
        positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.data.max_length, positions or self.data.max_length)

    def _questions(self, base: Base, rows: Sequence[Row]) -> Questions | None:
        if self.objective.metric not in GENERATED_METRICS:
            return None
        room = self._longest(base) - self.objective.max_new_tokens
        if room < 1:
            raise UserError(
                f"objective.max_new_tokens is {self.objective.max_new_tokens}, which leaves no "
                f"room for a prompt within {self._longest(base)} tokens"
            )
        return evaluation.questions(
            rows,
            base.tokenizer,
            count=self.objective.generation_samples,
            seed=self.data.seed,
            longest_prompt=room,
        )

    # -- one run -------------------------------------------------------------------------------

    def _train(
        self,
        configuration: Configuration,
        seed: int | None,
        progress: _Progress | None,
        folder: Path | None,
        trackers_name: str | None,
    ) -> tuple[int, Any]:
        from optuna_lora_rl.finetuning import lora
        from optuna_lora_rl.finetuning import sft
        from optuna_lora_rl.finetuning.measured import Meter
        from optuna_lora_rl.finetuning.quiet import quiet

        ready = self._ready
        seed = self.training.seed if seed is None else seed
        chosen = self._chosen(configuration)
        config = lora.lora_config(configuration, ready.base.architecture, chosen)
        meter = Meter(ready.device)
        try:
            with quiet(), _failures(progress), _own_randomness(seed), meter:
                with lora.attached(ready.base.model, config, chosen) as adapter:
                    if progress is not None:
                        progress.adapter = adapter
                    steps = sft.train(
                        adapter.model,
                        ready.base.tokenizer,
                        (ready.tokens.train, ready.tokens.validation),
                        configuration,
                        self._plan(configuration),
                        self.training,
                        device=ready.device,
                        seed=seed,
                        folder=folder or Path("runs"),
                        run_name=trackers_name,
                        on_evaluation=progress.evaluated if progress else _ignore,
                    )
                    _check_trained(adapter, configuration)
                    if folder is not None:
                        adapter.save(folder)
        finally:
            if progress is not None:
                progress.adapter = None
            self._free()
        return steps, meter

    def _free(self) -> None:
        # A trainer is a knot of references; until the collector unties it, the optimizer's state
        # stays on the GPU.
        if self._ready.device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()
        if {"deepspeed", "fsdp"} & set(self.training.extra):
            # Sharding takes the model apart for good: the next trial needs a fresh one.
            del self.__dict__["_ready"]

    def _chosen(self, configuration: Configuration) -> tuple[LinearModule, ...]:
        from optuna_lora_rl.finetuning import lora

        return lora.targets_of(configuration, self._ready.base.architecture, self.target_sets)

    def _plan(self, configuration: Configuration) -> Plan:
        from optuna_lora_rl.finetuning.sft import Plan

        return Plan.of(configuration, self.training, len(self._ready.lengths))

    def _evaluate(self, model: Any, dataset: Dataset, asked: Questions | None) -> dict[str, float]:
        from optuna_lora_rl.finetuning import sft

        ready = self._ready
        metrics = sft.evaluate(
            model, ready.base.tokenizer, dataset, self.training, device=ready.device
        )
        values = evaluation.teacher_forced(metrics)
        values.update(self._generated(model, asked))
        return values

    def _evaluate_base(self, dataset: Dataset, asked: Questions | None) -> dict[str, float]:
        from optuna_lora_rl.finetuning import lora

        base = self._ready.base.model
        with _own_randomness(), lora.restored(base, {}):
            return self._evaluate(base, dataset, asked)

    def _generated(self, model: Any, asked: Questions | None) -> dict[str, float]:
        if asked is None:
            return {}
        return evaluation.generated(
            model,
            self._ready.base.tokenizer,
            asked,
            max_new_tokens=self.objective.max_new_tokens,
            batch_size=self.training.eval_batch_size,
        )

    # -- cost ----------------------------------------------------------------------------------

    @cached_property
    def _reference(self) -> cost.Estimate:
        return self._full_run(Configuration.of(self.objective.reference))

    def _full_run(self, configuration: Configuration, steps: int | None = None) -> cost.Estimate:
        plan = self._plan(configuration)
        ready = self._ready
        examples = len(ready.lengths)
        work = cost.Work(
            steps=plan.steps if steps is None else steps,
            sequences=min(configuration.batch_size, examples / plan.steps_per_epoch),
            micro_batch_size=min(plan.micro_batch_size, examples),
            length=cost.expected_padded_length(ready.lengths, plan.micro_batch_size),
            checkpointing=self.training.gradient_checkpointing,
            itemsize=4 if self.training.precision == "fp32" else ready.base.model.dtype.itemsize,
        )
        return cost.estimate(
            configuration, ready.base.architecture, self._chosen(configuration), work
        )

    def _relative(self, run: cost.Estimate, reference: cost.Estimate) -> dict[str, float]:
        return self._weighted(
            time=run.flops / reference.flops,
            memory=run.memory_bytes / reference.memory_bytes,
            parameters=run.trainable_parameters / reference.trainable_parameters,
        )

    def _relative_measured(self, meter: Any, run: cost.Estimate) -> dict[str, float]:
        reference = self._measured_reference()
        return self._weighted(
            time=meter.seconds / reference.seconds,
            memory=meter.peak_bytes / reference.peak_bytes,
            parameters=run.trainable_parameters / self._reference.trainable_parameters,
        )

    def _weighted(self, **parts: float) -> dict[str, float]:
        weights = self.objective.cost.model_dump()
        total = sum(weights[name] * part for name, part in parts.items())
        return {**parts, "total": total / sum(weights.values())}

    def _measured_reference(self) -> _Measured:
        if self._reference_run is None:
            key = self._key("reference", asdict(Configuration.of(self.objective.reference)))
            saved = self._cached("references", key)
            if saved is None:
                configuration = Configuration.of(self.objective.reference)
                _, meter = self._train(configuration, None, None, None, None)
                values = {"seconds": meter.seconds, "peak_bytes": meter.peak_bytes}
                saved = self._store("references", key, values)
            self._reference_run = _Measured(**saved)
        return self._reference_run

    # -- what is measured once -----------------------------------------------------------------

    def _key(self, what: str, configuration: Mapping[str, Any] | None = None) -> str:
        """Hashes all that a measurement depends on; for a cost that includes the machine."""
        import torch
        import transformers

        ready = self._ready
        facts: dict[str, Any] = {
            "what": what,
            "model": ready.base.fingerprint,
            "device": ready.device.type,
            "versions": [torch.__version__, transformers.__version__],
            "training": self.training.model_dump(mode="json", exclude={"report_to", "seed"}),
            "validation": _tokens_hash(ready.tokens.validation),
        }
        if ready.asked is not None:
            facts["asked"] = [asdict(ready.asked), self.objective.max_new_tokens]
        if configuration is not None:
            facts["configuration"] = dict(configuration)
            facts["machine"] = [platform.node(), platform.processor(), torch.get_num_threads()]
            facts["train"] = _tokens_hash(ready.tokens.train)
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _cached(self, kind: str, key: str) -> dict[str, Any] | None:
        if self.cache is None:
            return None
        try:
            text = (self.cache / kind / f"{key}.json").read_text(encoding="utf-8")
            saved: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            # Absent, or half written by a run that was killed: measured again.
            return None
        return saved

    def _store(self, kind: str, key: str, values: dict[str, Any]) -> dict[str, Any]:
        if self.cache is not None:
            path = self.cache / kind / f"{key}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(values), encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"the cache folder {str(self.cache)!r} cannot be written: {error.strerror}"
                ) from None
        return values


class _Progress:
    """Follows one run: its curve, its score so far, and when to stop it."""

    def __init__(
        self, tuner: FineTuner, full: cost.Estimate, last_step: int, report: Report | None
    ) -> None:
        self.adapter: Adapter | None = None
        self.curve: list[dict[str, float]] = []
        self.values: dict[str, float] = {}
        self.stopped_early = False
        self.reported: BaseException | None = None
        self._tuner = tuner
        self._report = report
        self._baseline = tuner.baseline()
        total = tuner._relative(full, tuner._reference)["total"]
        self._charge = tuner.objective.cost_weight * total
        self._last_step = last_step

    def evaluated(self, step: int, epoch: float, metrics: dict[str, float]) -> bool:
        tuner = self._tuner
        values = evaluation.teacher_forced(metrics)
        if not evaluation.is_finite(values):
            raise FineTuningError(
                "diverged", f"the evaluation loss was {values['loss']} at step {step}"
            )
        if self.adapter is not None:
            values.update(tuner._generated(self.adapter.model, tuner._ready.asked))
        quality = evaluation.quality(tuner.objective.metric, values, self._baseline)
        score = quality - self._charge
        self.values = values
        self.curve.append({"step": step, "epoch": epoch, **values, "quality": quality})
        self.curve[-1]["score"] = score
        if self._report is not None:
            try:
                self._report(step, score, {**values, "quality": quality})
            except BaseException as error:
                self.reported = error
                raise
        self.stopped_early = self._is_stagnant() and step < self._last_step
        return self.stopped_early

    def _is_stagnant(self) -> bool:
        patience = self._tuner.training.early_stopping_patience
        qualities = [point["quality"] for point in self.curve]
        best = qualities.index(max(qualities))
        return 0 < patience <= len(qualities) - 1 - best


def _ignore(step: int, epoch: float, metrics: dict[str, float]) -> bool:
    return False


def _check_trained(adapter: Adapter, configuration: Configuration) -> None:
    if not adapter.changed():
        raise FineTuningError(
            "error",
            f"training left the adapter as it was (learning_rate {configuration.learning_rate:g})",
        )


@contextmanager
def _failures(progress: _Progress | None) -> Iterator[None]:
    import torch

    try:
        yield
    except (FineTuningError, UserError):
        raise
    except Exception as error:
        if progress is not None and error is progress.reported:
            raise
        text = str(error)
        exhausted = "out of memory" in text.lower() or "can't allocate memory" in text.lower()
        if exhausted or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise FineTuningError("out-of-memory", text.strip() or "out of memory") from error
        raise FineTuningError("error", f"{type(error).__name__}: {text.strip()}") from error


@contextmanager
def _own_randomness(seed: int | None = None) -> Iterator[None]:
    """Lets a run seed the global generators and gives them back as they were."""
    import numpy as np
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                from transformers import set_seed

                set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def _tokens_hash(dataset: Dataset) -> str:
    columns = [dataset["input_ids"][:], dataset["labels"][:]]
    return hashlib.blake2b(json.dumps(columns).encode(), digest_size=16).hexdigest()
