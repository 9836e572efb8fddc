"""A study's runs in a pack: which of them can be, how many, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers import set_seed

from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning import packable
from optuna_lora_rl.finetuning.coroutine import Globals
from optuna_lora_rl.finetuning.course import Course
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.lora import placed
from optuna_lora_rl.finetuning.member import Member
from optuna_lora_rl.finetuning.pack import Pack
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.quiet import quiet
from optuna_lora_rl.finetuning.run import Run
from optuna_lora_rl.finetuning.run import TrialResult
from optuna_lora_rl.finetuning.shared import Shared

# More gains little, and the sampler learns less from each of them.
_MOST = 8
# Share of the free memory that is planned with; the estimate leaves out what libraries take.
_PLANNED = 0.6


class SideBySide:
    """Runs a study's trials in a pack.

    Args:
        shared: What all runs share.
        alone: Carries out a run that cannot be packed.
        runs: Gives the next run, or None.
        done: Takes each run's outcome.
        says: Takes notes.
    """

    def __init__(
        self,
        shared: Shared,
        alone: Callable[[Run], TrialResult],
        runs: Callable[[], Run | None],
        done: Callable[[Run, TrialResult | Exception], None],
        says: Callable[[str], None],
    ) -> None:
        self._shared = shared
        self._alone = alone
        self._runs = runs
        self._done = done
        self._says = says
        self._base = shared.prepared.base
        self._probed = packable.probe(self._base.model, self._base.architecture.linears)

    def run(self, size: int | None) -> None:
        """Runs until there are no more runs.

        Args:
            size: Most runs at once, or None for what memory seems to hold.
        """
        shared = self._shared
        pack = Pack(
            self._base.model,
            shared.prepared.device,
            size=size or self._room(),
            checkpointing=shared.training.gradient_checkpointing,
            says=self._says,
        )
        # The untuned model is measured, if it was not, before anything is patched or frozen.
        _ = shared.baseline
        before = Globals.current()
        try:
            with quiet(), collected():
                pack.run(self._next)
        finally:
            # Also after an interrupt in the middle of a hand-over.
            before.install()

    def _next(self) -> _PackedRun | None:
        """Returns the next run that can be packed; those before it are over when it comes."""
        while (run := self._runs()) is not None:
            try:
                packed = _PackedRun(self._shared, run, self._done, self._by_itself, self._parted)
            except FineTuningError as error:
                self._done(run, error)
                continue
            reason = self._obstacle(packed.course)
            if reason is None:
                return packed
            self._by_itself(run, reason)
        return None

    def _parted(self, run: Run, reason: str) -> None:
        self._says(f"trial {run.number} runs alone: {reason}")

    def _by_itself(self, run: Run, reason: str) -> None:
        self._parted(run, reason)
        try:
            result: TrialResult | Exception = self._alone(run)
        except Exception as error:
            result = error
        self._done(run, result)

    def _obstacle(self, course: Course) -> str | None:
        shared = self._shared
        reason = packable.obstacle(course.wanted, course.chosen, self._probed, shared.training)
        if reason is None and shared.objective.cost_source == "measured":
            return "objective.cost_source is measured, and a pack's time is shared"
        if reason is None and self._base.call.own_head:
            return "its own output head may read more of the base model than a pack hands on"
        return reason

    def _room(self) -> int:
        """Estimates how many reference runs fit into the free memory beside the base model.

        On a CPU, one: a batch keeps a core busy by itself, and packs were six to ten percent
        slower than runs in turn (studies/results/throughput.md).
        """
        device = self._shared.prepared.device
        if device.type == "cpu":
            return 1
        free = torch.cuda.mem_get_info(device)[0]
        weights = sum(p.numel() * p.element_size() for p in self._base.model.parameters())
        own = max(self._shared.price.reference.memory_bytes - weights, 1.0)
        return max(1, min(_MOST, int(_PLANNED * free / own)))


class _PackedRun:
    """One run as a pack's job.

    Attributes:
        course: Its course.
    """

    def __init__(
        self,
        shared: Shared,
        run: Run,
        done: Callable[[Run, TrialResult | Exception], None],
        by_itself: Callable[[Run, str], None],
        parted: Callable[[Run, str], None],
    ) -> None:
        self._base = shared.prepared.base.model
        self._run = run
        self._done = done
        self._by_itself = by_itself
        self._parted = partial(parted, run)
        self._reached = 0
        self._member: Member | None = None
        self.course = Course(shared, run, self._reported)

    def work(self, member: Member) -> None:
        """Trains and evaluates the adapter, in a model of its own with the shared weights."""
        course, changes_base = self.course, self.course.wanted.mutates_base
        self._member = member
        moved = [module.name for module in course.chosen] if changes_base else []
        try:
            with failures(course.progress.is_callers):
                set_seed(course.seed)
                adapter = placed(model.twin(self._base, moved), course.config, course.start)
                member.join(adapter, subtracts_start=changes_base, parted=self._parted)
                course.train(adapter, member.after_backward)
        finally:
            course.close()
            self._member = None

    def done(self, error: Exception | None, took: Measured) -> None:
        """Hands the run's outcome on."""
        self._done(self._run, error or self.course.result(took))

    def alone(self) -> None:
        """Does it all again by itself, which repeats no report."""
        report, reached = self._run.report, self._reached

        def rest(step: int, score: float, metrics: Mapping[str, float]) -> None:
            if report is not None and step > reached:
                report(step, score, metrics)

        self._by_itself(replace(self._run, report=rest), "memory ran out beside others")

    def _reported(self, step: int, score: float, metrics: Mapping[str, float]) -> None:
        # Reports are the caller's, and are called in the caller's thread.
        if self._run.report is not None and self._member is not None:
            self._member.call(self._run.report, step, score, metrics)
        self._reached = step
