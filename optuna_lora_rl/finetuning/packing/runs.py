"""A study's runs in a pack: which of them can be, how many, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers import set_seed

from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import placed
from optuna_lora_rl.finetuning.packing import packable
from optuna_lora_rl.finetuning.packing.coroutine import Globals
from optuna_lora_rl.finetuning.packing.member import Member
from optuna_lora_rl.finetuning.packing.pack import Pack
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.trial import Trial
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult
from optuna_lora_rl.finetuning.workspace import Workspace

# More gains little, and the sampler learns less from each of them.
_MOST = 8
# Share of the free memory that is planned with; the estimate leaves out what libraries take.
_PLANNED = 0.6


class SideBySide:
    """Runs a study's trials in a pack.

    Args:
        workspace: What all runs share.
        alone: Carries out a run that cannot be packed.
        runs: Gives the next run, or None.
        done: Takes each run's outcome.
        parted: Told which run is alone, and why.
        says: Told when the pack becomes smaller.
    """

    def __init__(
        self,
        workspace: Workspace,
        alone: Callable[[TrialRequest], TrialResult],
        runs: Callable[[], TrialRequest | None],
        done: Callable[[TrialRequest, TrialResult | Exception], None],
        parted: Callable[[TrialRequest, str], None],
        says: Callable[[str], None],
    ) -> None:
        self._workspace = workspace
        self._alone = alone
        self._parted = parted
        self._runs = runs
        self._done = done
        self._says = says
        self._base = workspace.prepared.base
        self._probed = packable.probe(self._base.model, self._base.architecture.linears)

    def run(self, size: int | None) -> None:
        """Runs until there are no more runs.

        Args:
            size: Most runs at once, or None for what memory seems to hold.
        """
        workspace = self._workspace
        pack = Pack(
            self._base.model,
            workspace.prepared.device,
            size=size or self._room(),
            checkpointing=workspace.training.gradient_checkpointing,
            says=self._says,
        )
        # The untuned model is measured, if it was not, before anything is patched or frozen.
        _ = workspace.baseline
        before = Globals.current()
        try:
            with quiet(), collected():
                pack.run(self._next)
        finally:
            # Also after an interrupt in the middle of a hand-over.
            before.install()

    def _next(self) -> _PackedRun | None:
        """Returns the next run that can be packed; those before it are over when it comes."""
        while (request := self._runs()) is not None:
            try:
                packed = _PackedRun(
                    self._workspace, request, self._done, self._by_itself, self._parted
                )
            except FineTuningError as error:
                self._done(request, error)
                continue
            reason = self._obstacle(packed.trial)
            if reason is None:
                return packed
            self._by_itself(request, reason)
        return None

    def _by_itself(self, request: TrialRequest, reason: str) -> None:
        self._parted(request, reason)
        try:
            result: TrialResult | Exception = self._alone(request)
        except Exception as error:
            result = error
        self._done(request, result)

    def _obstacle(self, trial: Trial) -> str | None:
        workspace = self._workspace
        reason = packable.obstacle(trial.wanted, trial.chosen, self._probed, workspace.training)
        if reason is None and workspace.objective.cost_source == "measured":
            return "objective.cost_source is measured, and a pack's time is shared"
        if reason is None and self._base.call.own_head:
            return "its own output head may read more of the base model than a pack hands on"
        return reason

    def _room(self) -> int:
        """Estimates how many reference runs fit into the free memory beside the base model.

        On a CPU, one: a batch keeps a core busy by itself, and packs were six to ten percent
        slower than runs in turn (studies/results/throughput.md).
        """
        device = self._workspace.prepared.device
        if device.type == "cpu":
            return 1
        free = torch.cuda.mem_get_info(device)[0]
        weights = sum(p.numel() * p.element_size() for p in self._base.model.parameters())
        own = max(self._workspace.price.reference.memory_bytes - weights, 1.0)
        return max(1, min(_MOST, int(_PLANNED * free / own)))


class _PackedRun:
    """One run as a pack's job.

    Attributes:
        trial: What it trains.
    """

    def __init__(
        self,
        workspace: Workspace,
        request: TrialRequest,
        done: Callable[[TrialRequest, TrialResult | Exception], None],
        by_itself: Callable[[TrialRequest, str], None],
        parted: Callable[[TrialRequest, str], None],
    ) -> None:
        self._base = workspace.prepared.base.model
        self._request = request
        self._done = done
        self._by_itself = by_itself
        self._parted = partial(parted, request)
        self._reached = 0
        self._member: Member | None = None
        self.trial = Trial(workspace, request, self._reported)

    def work(self, member: Member) -> None:
        """Trains and evaluates the adapter, in a model of its own with the shared weights."""
        trial, changes_base = self.trial, self.trial.wanted.mutates_base
        self._member = member
        moved = [module.name for module in trial.chosen] if changes_base else []
        try:
            with failures(trial.progress.is_callers):
                set_seed(trial.seed)
                adapter = placed(model.twin(self._base, moved), trial.config, trial.start)
                member.join(adapter, subtracts_start=changes_base, parted=self._parted)
                trial.train(adapter, member.after_backward)
        finally:
            trial.close()
            self._member = None

    def done(self, error: Exception | None, took: Measured) -> None:
        """Hands the run's outcome on."""
        self._done(self._request, error or self.trial.result(took))

    def alone(self) -> None:
        """Does it all again by itself, which repeats no report."""
        report, reached = self._request.report, self._reached

        def rest(step: int, score: float, metrics: Mapping[str, float]) -> None:
            if report is not None and step > reached:
                report(step, score, metrics)

        self._by_itself(replace(self._request, report=rest), "memory ran out beside others")

    def _reported(self, step: int, score: float, metrics: Mapping[str, float]) -> None:
        # Reports are the caller's, and are called in the caller's thread.
        if self._request.report is not None and self._member is not None:
            self._member.call(self._request.report, step, score, metrics)
        self._reached = step
