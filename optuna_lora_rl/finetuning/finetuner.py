"""A study's fine-tuner: prepared once, then one run for each trial."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import process
from optuna_lora_rl.finetuning.cache import once
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.evaluation import quality
from optuna_lora_rl.finetuning.options import GENERATED_METRICS
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.progress import Report
from optuna_lora_rl.finetuning.trackers import Follower
from optuna_lora_rl.vocabulary import TARGET_PRESETS
from optuna_lora_rl.vocabulary import Value

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna_lora_rl.finetuning.answering import Answers
    from optuna_lora_rl.finetuning.cost import Estimate
    from optuna_lora_rl.finetuning.forecast import Forecast
    from optuna_lora_rl.finetuning.preparation import Prepared
    from optuna_lora_rl.finetuning.price import Measured
    from optuna_lora_rl.finetuning.trial import TrialRequest
    from optuna_lora_rl.finetuning.trial import TrialResult
    from optuna_lora_rl.finetuning.workspace import Workspace

__all__ = ["FineTuner", "FineTuningError", "Report"]


class FineTuner:
    """Fine-tunes LoRA adapters of one base model on one data set, one run for each trial.

    Loading is put off to the first use; then the base model is loaded once and the data is
    tokenised once, and each run leaves both as it found them. A run depends on nothing that a
    launcher or another trainer left in the process. Called from several threads, also of several
    fine-tuners, one call at a time is carried out, the others wait. In one of several processes
    that a launcher started for one training every call raises ``UserError``.

    Args:
        model: The base model.
        data: The examples.
        training: How every run trains.
        objective: What is maximised.
        target_sets: The user's own lists of module names, by name.
        typical: Parameters of a typical run, where they differ from the reference's: what decides
            how much evaluations may read.
        cache: Folder for what is made once (tokens, the untuned model's evaluation, the reference
            run); without it, it is made once in each process.
        on_activity: Told what takes its time beside the runs: loading, tokenising, measuring.

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
        typical: Mapping[str, Value] | None = None,
        cache: Path | None = None,
        on_activity: OnActivity = unseen,
    ) -> None:
        self.model = model
        self.data = data
        self.training = training
        self.objective = objective
        self.target_sets = dict(target_sets or {})
        self.typical = dict(typical or {})
        self.cache = cache
        self._on_activity = on_activity

    @process.alone()
    def prepare(self, targets: Iterable[str] = (), layers: Iterable[str] = ("all",)) -> list[str]:
        """Loads model and data and checks what can be checked before any trial.

        Args:
            targets: Values of ``target_modules`` that runs may have.
            layers: Values of ``layers`` that runs may have.

        Returns:
            What is worth knowing about the model, in sentences: what of it no run adapts.

        Raises:
            UserError: When the model or the data cannot be had, or do not fit each other or the
                options.
        """
        from optuna_lora_rl.finetuning import checking
        from optuna_lora_rl.finetuning import sft
        from optuna_lora_rl.finetuning.targets import select

        architecture = self.prepared.base.architecture
        for name in self.target_sets:
            if name in TARGET_PRESETS:
                raise UserError(f"target_sets.{name} is the name of a preset; take another name")
            select(architecture, name, "all", self.target_sets)
        checking.check_targets(architecture, targets, layers, self.target_sets)
        try:
            sft.check(self.workspace.price.reference_configuration, self.training)
            _ = self.workspace.price.reference
        except FineTuningError as error:
            raise UserError(f"objective.reference: {error.message}") from None
        return checking.notes(self.prepared.base)

    @property
    def precision(self) -> str:
        """The arithmetic of training: ``fp32``, ``bf16`` or ``fp16``."""
        return self.prepared.training.precision

    @process.alone()
    def traits(self) -> dict[str, int | float]:
        """Returns what there is to learn from and with: sizes of data and model, rows left out."""
        splits, tokens = self.prepared.splits, self.prepared.tokens
        lengths, architecture = self.prepared.lengths, self.prepared.base.architecture
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

    @process.alone()
    def data_facts(self) -> dict[str, Any]:
        """Returns what was made of the data, as JSON values.

        They are ``kind``, ``learns`` (in words), ``unread`` (columns), ``max_length``,
        ``answered`` (how many examples a generated metric reads, or None) and ``splits``: by name,
        the fields of ``data.Counts``, with ``used`` as it is after tokenising, ``emptied``
        (nothing left to learn), ``cut`` and ``special`` (holds the text of a special token).
        ``evaluations`` are the examples that each reads, ``evaluated`` their share of the work.
        """
        from optuna_lora_rl.finetuning.data_facts import facts

        return facts(self.workspace)

    @process.alone()
    def baseline(self) -> Evaluation:
        """Returns the untuned model's evaluation on the validation set, measured once."""
        return self.workspace.baseline

    @process.alone()
    def forecast(self) -> Forecast:
        """Measures two steps of a typical run, and returns what a whole one will take.

        Raises:
            FineTuningError: When such a run fails.
        """
        from optuna_lora_rl.finetuning import forecast

        typical = {**self.objective.reference, **self.typical}
        return forecast.measure(self.workspace, typical, self._on_activity)

    @process.alone()
    def estimate(self, configuration: Mapping[str, Value]) -> tuple[Estimate, dict[str, float]]:
        """Counts a whole run without doing it, and returns it with its ``cost_parts``.

        Raises:
            FineTuningError: When there is nothing that the configuration could adapt.
        """
        price = self.workspace.price
        counted = price.estimate(Configuration.of(configuration))
        return counted, price.estimated(counted)

    @process.alone()
    def run(
        self,
        configuration: Mapping[str, Value],
        *,
        number: int = 0,
        seed: int | None = None,
        report: Report | None = None,
        folder: Path | None = None,
        trackers_name: str | None = None,
        on_activity: OnActivity = unseen,
    ) -> TrialResult:
        """Trains and evaluates one adapter.

        Args:
            configuration: The trial's parameters; those left out have their defaults.
            number: The trial's number, for the log and the trackers.
            seed: Of initialisation, dropout and order; ``training.seed`` if left out.
            report: Called at every evaluation; what it raises comes out of ``run``, after the
                base model was restored.
            folder: Where the adapter is saved in PEFT format; not saved if left out.
            trackers_name: The run's name in trackers.
            on_activity: Told what the run does, step by step.

        Raises:
            FineTuningError: When the trial failed by itself.
        """
        from optuna_lora_rl.finetuning.trial import TrialRequest

        return self._alone(
            TrialRequest(number, configuration, seed, report, folder, trackers_name, on_activity)
        )

    @process.alone()
    def run_packed(
        self,
        runs: Callable[[], TrialRequest | None],
        done: Callable[[TrialRequest, TrialResult | Exception], None],
        *,
        size: int | None = None,
        says: Callable[[str], None] | None = None,
        alone: Callable[[TrialRequest, str], None] | None = None,
    ) -> None:
        """Trains and evaluates adapters side by side, over one forward pass of the base model.

        Each run gives what it gives alone, to float tolerance (tests compare on a CPU) and to
        the draws of dropout, which alone may meet rows end to end and here meets padded ones. What
        cannot be packed runs alone, while the others wait; a run whose own part of a step finds
        no memory beside others runs again, alone. All functions are called in the caller's
        thread, one at a time.

        Args:
            runs: Called whenever a place is free; None for "nothing now", asked again when a
                run has ended.
            done: Called as each run ends, with its result, a ``FineTuningError``, or what its
                report raised.
            size: Most runs side by side; what memory seems to hold if left out.
            says: Told in a sentence when the pack becomes smaller.
            alone: Told which run trains alone, and why; ``says`` is, in a sentence, if left out.

        Raises:
            BaseException: What ``runs`` and ``done`` raise, and what is no ``Exception`` from a
                report; all runs are ended.
        """
        from optuna_lora_rl.finetuning.packing.runs import SideBySide

        notes = says or (lambda note: None)

        def noted(request: TrialRequest, reason: str) -> None:
            notes(f"trial {request.number} runs alone: {reason}")

        side_by_side = SideBySide(
            self.workspace, self._alone, runs, done, parted=alone or noted, says=notes
        )
        side_by_side.run(size)

    def _alone(self, request: TrialRequest) -> TrialResult:
        from optuna_lora_rl.finetuning.trial import Trial

        follower, trial = Follower(self.training.report_to, request), None
        is_measured = self.objective.cost_source == "measured"
        try:
            trial = Trial(self.workspace, request, follower=follower)
            took = trial.alone()
            result = trial.result(took, (lambda: self._reference) if is_measured else None)
        except BaseException as error:
            if not isinstance(error, Exception):
                follower.ended("interrupted", {})
            elif trial is not None and trial.progress.is_callers(error):
                follower.ended("pruned", trial.so_far())
            else:
                follower.ended("failed", {}, first_line(error))
            raise
        values = {"score": result.score, "quality": result.quality, "cost": result.cost}
        follower.ended("complete", values)
        return result

    @process.alone()
    def test(self, adapter: Path) -> Evaluation | None:
        """Evaluates a saved adapter on the test split, or returns None where there is none.

        No trial looks at the split, which is tokenised with the others; call this once, for the
        final best.
        """
        from optuna_lora_rl.finetuning.isolation import quiet
        from optuna_lora_rl.finetuning.lora import loaded
        from optuna_lora_rl.finetuning.preparation import questions

        prepared = self.prepared
        base, rows, dataset = prepared.base, prepared.splits.test, prepared.tokens.test
        if rows is None or dataset is None:
            return None
        asked = questions(base, rows, self.data, self.objective)
        what = "evaluating the untuned model on the test split"
        before = Evaluation(**self.workspace.evaluate_base(dataset, asked, what))
        what = "evaluating the best adapter on the test split"
        with quiet(), loaded(base.model, adapter) as adapted:
            after = Evaluation(**self.workspace.evaluate(adapted, dataset, asked, what))
        gained = quality(self.objective.metric, after.metrics(), before)
        return replace(after, quality=gained)

    @process.alone()
    def answers(self, adapter: Path | None, count: int) -> Answers | None:
        """Answers held-out questions: of the test split, or of validation where there is none.

        Args:
            adapter: A saved adapter's folder; None for the untuned model.
            count: How many questions, the same for every adapter. With a metric that compares
                answers it is ``objective.generation_samples``, as in the evaluation.

        Returns:
            None where the data ask nothing.

        Raises:
            UserError: When the adapter cannot be loaded.
        """
        from optuna_lora_rl.finetuning import answering
        from optuna_lora_rl.finetuning.isolation import quiet
        from optuna_lora_rl.finetuning.lora import loaded
        from optuna_lora_rl.finetuning.lora import restored

        base, workspace, tell = self.prepared.base.model, self.workspace, self._on_activity
        if self.objective.metric in GENERATED_METRICS:
            count = self.objective.generation_samples
        if adapter is None:
            with restored(base, {}):
                return answering.answers(workspace, base, count, on_activity=tell)
        with quiet(), loaded(base, adapter) as adapted:
            return answering.answers(workspace, adapted, count, on_activity=tell)

    @process.alone()
    def cut(self, adapter: Path) -> list[float]:
        """Cuts a saved adapter to ever less of its energy, and evaluates what is left.

        Args:
            adapter: Its folder, which stays as it is.

        Returns:
            The qualities on the validation set, in the order of ``rank.truncation.sizes``.

        Raises:
            UserError: When it cannot be read, is of another model, or is on the output head.
        """
        from optuna_lora_rl.finetuning.isolation import quiet
        from optuna_lora_rl.finetuning.lora import ADAPTED
        from optuna_lora_rl.finetuning.lora import loaded
        from optuna_lora_rl.rank import layers
        from optuna_lora_rl.rank import resizing
        from optuna_lora_rl.rank import truncation

        own, workspace, prepared = truncation.cuttable(adapter), self.workspace, self.prepared
        base, baseline = prepared.base.model, workspace.baseline
        own.check_fits(layers.shapes_of(base, with_head=True), prepared.base.name)
        found: list[float] = []
        with quiet(), loaded(base, adapter) as adapted:
            if isinstance(adapted.get_base_model().get_output_embeddings(), ADAPTED):
                # TRL computes the loss from the head's own weights.
                raise UserError(
                    f"the adapter in {str(adapter)!r} is on the output head, so that its quality "
                    "cannot be measured; truncate shows its sizes without --study"
                )
            # The best approximation of the best approximation is that of the whole.
            sizes = truncation.sizes(own.factors)[::-1]
            for size in counted(sizes, "cutting and evaluating", "sizes", self._on_activity):
                if resizing.resize(adapted, size.ranks) or not found:
                    # Of the sizes, and not of the batches, it is told how many are done.
                    values = workspace.evaluate(
                        adapted, workspace.validation, prepared.asked, on_activity=unseen
                    )
                    now = quality(self.objective.metric, values, baseline)
                found.append(now)
        return found[::-1]

    @property
    def prepared(self) -> Prepared:
        """The base model and the tokenised data; loaded at the first use."""
        return self.workspace.prepared

    @cached_property
    def workspace(self) -> Workspace:
        """What all trials share. Who uses it takes no turn with the trials of other threads."""
        # With it come torch, transformers, TRL and PEFT.
        from optuna_lora_rl.finetuning.workspace import Workspace

        return Workspace(
            self.model,
            self.data,
            self.training,
            self.objective,
            self.target_sets,
            self.typical,
            self.cache,
            self._on_activity,
        )

    @cached_property
    def _reference(self) -> Measured:
        from optuna_lora_rl.finetuning.price import Measured
        from optuna_lora_rl.finetuning.trial import Trial
        from optuna_lora_rl.finetuning.trial import TrialRequest
        from optuna_lora_rl.finetuning.workspace import content_of

        workspace, tokens = self.workspace, self.prepared.tokens
        configuration = asdict(workspace.price.reference_configuration)
        facts = {
            **workspace.facts(workspace.validation, self.prepared.asked),
            "configuration": configuration,
            "train": content_of(tokens.train),
            "machine": [platform.node(), platform.processor()],
        }

        def measure() -> dict[str, float]:
            reference = TrialRequest(0, configuration, on_activity=self._measures_reference)
            return asdict(Trial(workspace, reference).alone())

        return Measured(**once(self.cache, "references", facts, measure))

    def _measures_reference(self, activity: Activity) -> None:
        self._on_activity(replace(activity, what=f"the reference run: {activity.what}"))
