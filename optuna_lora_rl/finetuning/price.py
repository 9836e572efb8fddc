"""What a run costs, relative to the reference configuration's run."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property

import psutil
import torch

from optuna_lora_rl.finetuning import cost
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.cost import Estimate
from optuna_lora_rl.finetuning.lora import targets_of
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.preparation import Prepared
from optuna_lora_rl.finetuning.ranks import Allocated
from optuna_lora_rl.finetuning.ranks import Allocator
from optuna_lora_rl.finetuning.sft import Plan


class Meter:
    """Measures the block that it is entered for.

    On a GPU the peak is what CUDA allocated; on a CPU it is the process's resident memory,
    sampled by a thread, and so includes the libraries.

    Attributes:
        seconds: Wall time.
        peak_bytes: Peak memory.
    """

    _INTERVAL = 0.02

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._device = device
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0.0

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if self._thread is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            if self._done.wait(self._INTERVAL):
                return


@dataclass(frozen=True)
class Measured:
    """What a run took: wall time and peak memory."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Adapted:
    """What a configuration adapts.

    Attributes:
        modules: The modules.
        allocated: Their ranks, and what finding these took.
    """

    modules: tuple[LinearModule, ...]
    allocated: Allocated


class Price:
    """Prices runs: ``sum_i w_i (x_i / reference_i) / sum_i w_i`` over time, memory, parameters.

    Args:
        prepared: Model and data.
        dtype: Type of the base weights, as the options say it.
        training: How every run trains.
        objective: The weights and the reference configuration.
        target_sets: The user's own lists of module names.
        allocator: Finds ranks by layer; what finding them takes is part of the price.
    """

    def __init__(
        self,
        prepared: Prepared,
        dtype: str,
        training: TrainingOptions,
        objective: ObjectiveOptions,
        target_sets: Mapping[str, Sequence[str]],
        allocator: Allocator,
    ) -> None:
        self._prepared = prepared
        self._dtype = dtype
        self._training = training
        self._weights = objective.cost.model_dump()
        self._target_sets = target_sets
        self._allocator = allocator
        self.reference_configuration = Configuration.of(objective.reference)

    @cached_property
    def reference(self) -> Estimate:
        """The reference run, counted."""
        return self.estimate(self.reference_configuration)

    def estimate(
        self,
        configuration: Configuration,
        adapted: Adapted | None = None,
        steps: int | None = None,
    ) -> Estimate:
        """Counts a run at the ranks of its start.

        Args:
            configuration: The configuration.
            adapted: What it adapts, where that has been found.
            steps: The steps that were done; all that are planned if None.
        """
        adapted = adapted or self.adapted(configuration)
        run = self._count(configuration, adapted.modules, steps, adapted.allocated.ranks)
        return replace(run, flops=run.flops + adapted.allocated.flops)

    def followed(
        self,
        configuration: Configuration,
        adapted: Adapted,
        spells: Sequence[tuple[int, Mapping[str, int]]],
    ) -> Estimate:
        """Counts a run whose ranks changed: its FLOPs as they were, the largest of the rest.

        Args:
            configuration: The configuration.
            adapted: What it adapts.
            spells: For how many steps which ranks were in place.
        """
        parts = [
            self._count(configuration, adapted.modules, steps, ranks) for steps, ranks in spells
        ]
        return Estimate(
            flops=adapted.allocated.flops + sum(part.flops for part in parts),
            memory_bytes=max(part.memory_bytes for part in parts),
            trainable_parameters=max(part.trainable_parameters for part in parts),
        )

    def _count(
        self,
        configuration: Configuration,
        chosen: tuple[LinearModule, ...],
        steps: int | None,
        ranks: Mapping[str, int],
    ) -> Estimate:
        prepared = self._prepared
        lengths, base = prepared.lengths, prepared.base
        plan = Plan.of(configuration, self._training, len(lengths))
        work = cost.Work(
            steps=plan.steps if steps is None else steps,
            sequences=min(configuration.batch_size, len(lengths) / plan.steps_per_epoch),
            micro_batch_size=min(plan.micro_batch_size, len(lengths)),
            length=cost.expected_padded_length(lengths, plan.micro_batch_size),
            checkpointing=self._training.gradient_checkpointing,
            itemsize=2 if self._training.precision in ("bf16", "fp16") else 4,
            weight_itemsize=2 if self._dtype in ("bfloat16", "float16") else 4,
        )
        run = cost.estimate(configuration, base.architecture, chosen, work, ranks)
        if configuration.rank_change == "gradient":
            options = self._training.rank_change.gradient
            looks = work.steps / options.every
            each = cost.sketch_flops(chosen, work.length, options.columns)
            run = replace(run, flops=run.flops + looks * work.sequences * each)
        return run

    def adapted(self, configuration: Configuration) -> Adapted:
        """Returns the modules and ranks of a configuration."""
        architecture = self._prepared.base.architecture
        modules = targets_of(configuration, architecture, self._target_sets)
        return Adapted(modules, self._allocator.share(configuration, modules))

    def estimated(self, run: Estimate) -> dict[str, float]:
        """Returns the relative parts of a counted run and their weighted total."""
        return self._weighted(
            time=run.flops / self.reference.flops,
            memory=run.memory_bytes / self.reference.memory_bytes,
            parameters=run.trainable_parameters / self.reference.trainable_parameters,
        )

    def measured(self, took: Measured, reference: Measured, run: Estimate) -> dict[str, float]:
        """Returns the same of a measured run, against the measured reference run."""
        return self._weighted(
            time=took.seconds / reference.seconds,
            memory=took.peak_bytes / reference.peak_bytes,
            parameters=run.trainable_parameters / self.reference.trainable_parameters,
        )

    def _weighted(self, **parts: float) -> dict[str, float]:
        total = sum(self._weights[name] * part for name, part in parts.items())
        return {**parts, "total": total / sum(self._weights.values())}
