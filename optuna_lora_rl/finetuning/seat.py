"""One run of a pack, seen from outside."""

from __future__ import annotations

from typing import Any
from typing import Protocol

from optuna_lora_rl.finetuning.coroutine import Coroutine
from optuna_lora_rl.finetuning.member import Backward
from optuna_lora_rl.finetuning.member import Forward
from optuna_lora_rl.finetuning.member import Member
from optuna_lora_rl.finetuning.price import Measured


class Job(Protocol):
    """One run for a pack."""

    def work(self, member: Member) -> None:
        """The run itself, called in a coroutine."""

    def done(self, error: Exception | None, took: Measured) -> None:
        """Called in the thread of the pack when ``work`` has ended."""

    def alone(self) -> None:
        """Called instead when memory ran out beside others: does all again, outside the pack."""


class Seat:
    """One run in the pack, seen from outside.

    Attributes:
        job: The run.
        member: Its own side.
        coroutine: Where it runs.
        batch: The batch that it gave last.
        seconds: Its share of the time so far.
        peak_bytes: The peak of memory while it was at work, the others' memory included.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.coroutine: Coroutine[None] = Coroutine(lambda: job.work(self.member))
        self.member = Member(self.coroutine.ask)
        self.batch: Forward | None = None
        self.seconds = 0.0
        self.peak_bytes = 0

    def takes(self) -> Forward:
        """The batch that it waits with, or waited with before its backward pass."""
        request = self.coroutine.request
        if isinstance(request, Forward):
            self.batch = request
        assert self.batch is not None
        return self.batch

    def waits_to_go_back(self) -> bool:
        return isinstance(self.coroutine.request, Backward)

    def order(self) -> tuple[Any, ...]:
        """Places runs side by side whose updates can be computed together."""
        trained = self.member.trained
        ranks = [factors.a.shape[0] for factors in trained.values()]
        return len(self.takes().input_ids), sorted(trained), max(ranks, default=0)
