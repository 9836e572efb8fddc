"""A study's runs in a pack: which of them can be, how many, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from transformers import set_seed

from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning import packable
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.coroutine import Globals
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.lora import Adapter
from optuna_lora_rl.finetuning.lora import placed
from optuna_lora_rl.finetuning.member import Member
from optuna_lora_rl.finetuning.pack import Pack
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.progress import Progress
from optuna_lora_rl.finetuning.quiet import quiet

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.trial import FineTuner
    from optuna_lora_rl.finetuning.trial import Run
    from optuna_lora_rl.finetuning.trial import TrialResult

# More gains little, and the sampler learns less from each of them.
_MOST = 8
# Share of the free memory that is planned with; the estimate leaves out what libraries take.
_PLANNED = 0.6


class SideBySide:
    """Runs a fine-tuner's trials in a pack.

    Args:
        tuner: The fine-tuner.
        runs: Gives the next run, or None.
        done: Takes each run's outcome.
        says: Takes notes.
    """

    def __init__(
        self,
        tuner: FineTuner,
        runs: Callable[[], Run | None],
        done: Callable[[Run, TrialResult | Exception], None],
        says: Callable[[str], None],
    ) -> None:
        self._tuner = tuner
        self._runs = runs
        self._done = done
        self._says = says
        self._base = tuner._prepared.base
        self._probed = packable.probe(self._base.model, self._base.architecture.linears)

    def run(self, size: int | None) -> None:
        """Runs until there are no more runs.

        Args:
            size: Most runs at once, or None for what memory seems to hold.
        """
        tuner = self._tuner
        pack = Pack(
            self._base.model,
            tuner._prepared.device,
            size=size or self._room(),
            checkpointing=tuner.training.gradient_checkpointing,
            says=self._says,
        )
        # The untuned model is measured, if it was not, before anything is patched or frozen.
        tuner.baseline()
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
                wanted = Configuration.of(run.configuration)
                config, chosen = self._tuner._checked(wanted)
            except FineTuningError as error:
                self._done(run, error)
                continue
            reason = packable.obstacle(wanted, chosen, self._probed, self._tuner.training)
            if reason is None:
                if self._tuner.objective.cost_source != "measured":
                    return _PackedRun(self._tuner, run, wanted, config, chosen, self._done)
                reason = "objective.cost_source is measured, and a pack's time is shared"
            self._says(f"trial {run.number} runs alone: {reason}")
            self._alone(run)
        return None

    def _alone(self, run: Run) -> None:
        try:
            result: TrialResult | Exception = self._tuner._alone(run)
        except Exception as error:
            result = error
        self._done(run, result)

    def _room(self) -> int:
        """Estimates how many reference runs fit into the free memory beside the base model.

        On a CPU, one: a batch keeps a core busy by itself, and packs were three to nine percent
        slower than runs in turn (studies/results/throughput.md).
        """
        device = self._tuner._prepared.device
        if device.type == "cpu":
            return 1
        free = torch.cuda.mem_get_info(device)[0]
        weights = sum(p.numel() * p.element_size() for p in self._base.model.parameters())
        own = max(self._tuner._price.reference.memory_bytes - weights, 1.0)
        return max(1, min(_MOST, int(_PLANNED * free / own)))


class _PackedRun:
    """One run as a pack's job."""

    def __init__(
        self,
        tuner: FineTuner,
        run: Run,
        wanted: Configuration,
        config: LoraConfig,
        chosen: tuple[LinearModule, ...],
        done: Callable[[Run, TrialResult | Exception], None],
    ) -> None:
        self._tuner = tuner
        self._run = run
        self._wanted = wanted
        self._config = config
        self._chosen = chosen
        self._done = done
        self._in_place: list[Adapter] = []
        self._steps = 0
        self._progress: Progress | None = None

    def work(self, member: Member) -> None:
        """Trains and evaluates the adapter, in a model of its own with the shared weights."""
        tuner, run, wanted = self._tuner, self._run, self._wanted
        report = None if run.report is None else partial(member.call, run.report)
        self._progress = progress = tuner._progress(wanted, report, self._in_place)
        moved = [module.name for module in self._chosen] if wanted.mutates_base else []
        with failures(progress.is_callers):
            set_seed(tuner._seed(run))
            adapter = placed(model.twin(tuner._prepared.base.model, moved), self._config)
            self._in_place.append(adapter)
            member.join(adapter, subtracts_start=wanted.mutates_base)
            self._steps = tuner._fit(
                adapter, wanted, run, progress.evaluated, member.after_backward
            )

    def done(self, error: Exception | None, took: Measured) -> None:
        """Hands the run's outcome on."""
        self._in_place.clear()
        self._tuner._release()
        if error is None and self._progress is not None:
            self._done(
                self._run, self._tuner._result(self._wanted, self._progress, self._steps, took)
            )
        elif error is not None:
            self._done(self._run, error)
