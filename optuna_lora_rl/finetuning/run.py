"""One run of a fine-tuner: what is asked of it, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.finetuning.progress import Report
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
class Run:
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
