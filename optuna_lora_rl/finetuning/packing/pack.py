"""Several fine-tuning runs side by side over one forward pass of the base model.

Each run is an ordinary one: its own PeftModel, its own trainer with data order, loss, optimizer,
schedule, clipping and evaluation, in a coroutine of its own. Only its backbone is not its own.
Where the trainer calls it, the run waits; when all wait, their batches go through the shared
base model together, each with its own low-rank updates (``adapters.py``), and every run gets
the hidden states of its own rows. What comes after (head, loss, metrics) is the trainer's again.
The backward pass takes the same way: each loss is differentiated as far as the hidden states,
and from there all go back together.

Runs need not be in step. One that ends, in whatever way, leaves its place to the next.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import is_out_of_memory
from optuna_lora_rl.finetuning.isolation import let_go
from optuna_lora_rl.finetuning.packing.adapters import PackedBatch
from optuna_lora_rl.finetuning.packing.adapters import Share
from optuna_lora_rl.finetuning.packing.coroutine import Globals
from optuna_lora_rl.finetuning.packing.member import Call
from optuna_lora_rl.finetuning.packing.member import Forward
from optuna_lora_rl.finetuning.packing.member import Job
from optuna_lora_rl.finetuning.packing.member import Member
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.finetuning.products import cast_once

# On a CPU, products of more rows than this are no faster, and activations fall out of the cache.
_CPU_SEQUENCES = 64


@dataclass(eq=False)
class _Pass:
    """Batches that went through the base model together.

    Attributes:
        members: Whose batches they are, in the order of their rows.
        shares: Their parts.
        together: Their adapters.
        output: Hidden states, (sequences, length, hidden).
        before: The members' global state before the pass.
    """

    members: list[Member]
    shares: list[Share]
    together: PackedBatch
    output: Tensor
    before: list[Globals]

    def own(self, tensor: Tensor, share: Share) -> Tensor:
        return tensor[slice(*share.rows), : share.length]


class Pack:
    """Runs jobs side by side.

    Args:
        base: The shared base model; between the passes it is as it was.
        device: Where it is.
        size: Most runs at once.
        checkpointing: Whether activations are recomputed in the backward pass.
        says: Told when the pack has to become smaller.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        device: torch.device,
        *,
        size: int,
        checkpointing: bool,
        says: Callable[[str], None],
    ) -> None:
        self._base = base
        self._device = device
        self._size = size
        self._most = size
        self._checkpointing = checkpointing
        self._says = says
        self._members: list[Member] = []
        self._again: list[Job] = []
        self._asks = True
        self._process = psutil.Process()

    def run(self, jobs: Callable[[], Job | None]) -> None:
        """Runs until ``jobs`` has none and all have ended.

        Args:
            jobs: Called whenever a place is free; None for "not now", asked again when a run
                has ended.

        Raises:
            BaseException: What ``jobs`` and ``done`` raise; the runs are abandoned.
        """
        try:
            with cast_once(self._base):
                while self._fill(jobs):
                    looking = [member for member in self._members if not member.takes().trains]
                    # First those that only evaluate, so that all take the next step together.
                    for alike in _alike(looking or self._members):
                        self._serve(alike)
        finally:
            for member in self._members:
                member.coroutine.abandon()
                let_go(member.coroutine.error)
            self._members.clear()

    def _fill(self, jobs: Callable[[], Job | None]) -> bool:
        while self._again and not self._members:
            self._again.pop(0).alone()
            self._asks = True
        # None joins while somebody waits for the pack to be empty.
        while self._asks and not self._again and len(self._members) < self._size:
            job = jobs()
            if job is None:
                self._asks = False
                break
            member = Member(job)
            self._members.append(member)
            self._advance(member)
        return bool(self._members or self._again)

    def _advance(
        self, member: Member, answer: Any = None, *, error: BaseException | None = None
    ) -> None:
        """Lets a run go on until it waits for a pass, or ends."""
        while True:
            with self._charged([member]):
                member.coroutine.resume(answer, error=error)
            if member.coroutine.ended:
                self._ends(member)
                return
            request = member.coroutine.request
            if not isinstance(request, Call):
                return
            answer = error = None
            try:
                answer = request.function(*request.arguments)
            except Exception as raised:
                error = raised

    def _ends(self, member: Member) -> None:
        self._members.remove(member)
        self._asks = True
        error = member.coroutine.error
        if error is not None and not isinstance(error, Exception):
            raise error
        if _is_exhausted(error) and self._members:
            # Not at what the runs share, but at its own part, for which others left no room.
            self._again.append(member.job)
            self._shrinks_to((len(self._members) + 2) // 2)
        else:
            member.job.done(error, Measured(member.seconds, member.peak_bytes))
        let_go(error)
        # A trainer is a knot of references, and the collector rarely comes by itself.
        gc.collect()

    def _serve(self, members: Sequence[Member]) -> None:
        """Takes the runs' batches through the base model and their gradients back."""
        for together in self._cut(sorted(members, key=Member.order)):
            for passed in self._forward(together):
                self._answer(passed)

    def _cut(self, members: list[Member]) -> Iterator[list[Member]]:
        """Cuts runs into passes: what memory allows and, on a CPU, the cache likes."""
        together: list[Member] = []
        for member in members:
            rows = sum(len(other.takes().input_ids) for other in (*together, member))
            crowded = self._device.type == "cpu" and rows > _CPU_SEQUENCES
            if together and (crowded or len(together) >= self._most):
                yield together
                together = []
            together.append(member)
        yield together

    def _answer(self, passed: _Pass) -> None:
        rest: list[Member] = []
        for i, (member, share) in enumerate(zip(passed.members, passed.shares, strict=True), 1):
            # Cut off from the graph: its loss goes back as far as this.
            hidden = passed.own(passed.output, share).detach()
            self._advance(member, hidden.requires_grad_(passed.output.requires_grad))
            if _is_exhausted(member.coroutine.error):
                # There is no room beside this pass: the others take one of their own after it.
                rest = passed.members[i:]
                break
        self._backward(passed)
        for member in passed.members:
            if member.waits_to_go_back():
                member.hidden = None
                self._advance(member)
        if rest:
            passed.output = passed.output.detach()
            for member, state in zip(rest, passed.before[-len(rest) :], strict=True):
                member.coroutine.globals = state
            self._serve(rest)

    def _forward(self, members: list[Member]) -> Iterator[_Pass]:
        """Computes the hidden states, in as many passes as memory needs.

        Each pass has to be over, its way back included, before the next is asked for.
        """
        before = [member.coroutine.globals for member in members]
        error = None
        try:
            with self._charged(members):
                passed = self._passed(members, before)
        except (RuntimeError, MemoryError) as raised:
            if not is_out_of_memory(raised):
                raise
            error = raised
        if error is None:
            yield passed
            return
        self._makes_room(error)
        for member, state in zip(members, before, strict=True):
            member.coroutine.globals = state
        if len(members) == 1:
            self._advance(members[0], error=error)
            return
        for half in self._halves(members):
            yield from self._forward(half)

    def _passed(self, members: list[Member], before: list[Globals]) -> _Pass:
        batches = [member.takes() for member in members]
        first = batches[0]
        length = max(batch.input_ids.shape[1] for batch in batches)
        shares = list(self._shares(members, batches))
        together = PackedBatch(shares, drops=first.drops, replays=self._checkpointing)
        kind = self._device.type
        with (
            torch.set_grad_enabled(first.trains),
            torch.autocast(kind, dtype=first.autocast, enabled=first.autocast is not None),
            self._ready(together, trains=first.trains),
        ):
            output = self._base.base_model(
                input_ids=_padded([batch.input_ids for batch in batches], length),
                attention_mask=_padded([batch.attention_mask for batch in batches], length),
                use_cache=False,
            ).last_hidden_state
        for member, share in zip(members, shares, strict=True):
            if share.generator is not None:
                member.coroutine.globals = member.coroutine.globals.drawn(share.generator)
        return _Pass(members, shares, together, output, before)

    def _shares(self, members: list[Member], batches: list[Forward]) -> Iterator[Share]:
        start = 0
        for member, batch in zip(members, batches, strict=True):
            rows, length = batch.input_ids.shape
            trained = member.trained
            drops = batch.drops and any(factors.dropout > 0 for factors in trained.values())
            yield Share(
                trained=trained,
                fixed=member.fixed,
                rows=(start, start + rows),
                length=length,
                generator=member.coroutine.globals.generator(self._device) if drops else None,
            )
            start += rows

    def _backward(self, passed: _Pass) -> None:
        """Adds to the adapters' gradients what the hidden states' gradients make of them."""
        waiting = [member for member in passed.members if member.waits_to_go_back()]
        if not waiting:
            return
        error = None
        try:
            with self._charged(waiting):
                self._go_back(passed, waiting)
            return
        except (RuntimeError, MemoryError) as raised:
            if not is_out_of_memory(raised):
                raise
            error = raised
        passed.output = passed.output.detach()
        self._makes_room(error)
        if len(waiting) == 1:
            self._advance(waiting[0], error=error)
            return
        before = dict(zip(passed.members, passed.before, strict=True))
        for half in self._halves(waiting):
            for member in half:
                member.coroutine.globals = before[member]
            for again in self._forward(half):
                self._backward(again)

    def _go_back(self, passed: _Pass, waiting: list[Member]) -> None:
        arriving = torch.zeros_like(passed.output)
        for member, share in zip(passed.members, passed.shares, strict=True):
            if member in waiting and member.hidden is not None:
                gradient = member.hidden.grad
                if gradient is not None:
                    passed.own(arriving, share).copy_(gradient)
        weights = [weight for member in waiting for weight in member.weights()]
        with self._ready(passed.together, trains=True):
            # Not `backward`: if memory runs out half-way, no gradient has been added yet.
            gradients = torch.autograd.grad(passed.output, weights, arriving)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def _halves(self, members: list[Member]) -> tuple[list[Member], list[Member]]:
        middle = (len(members) + 1) // 2
        if middle < self._most:
            self._most = middle
            shared = f"at most {middle} trials share a pass" if middle > 1 else "trials take turns"
            self._says(f"memory ran out: from now on {shared}")
        return members[:middle], members[middle:]

    def _shrinks_to(self, size: int) -> None:
        if size < self._size:
            self._size, self._most = size, min(self._most, size)
            beside = f"at most {size} trials run side by side" if size > 1 else "trials run alone"
            self._says(f"memory ran out: from now on {beside}")

    def _makes_room(self, error: BaseException) -> None:
        let_go(error)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _ready(self, together: PackedBatch, *, trains: bool) -> Iterator[None]:
        """The base model with the adapters in it."""
        recomputes = self._checkpointing and trains
        with together.within(self._base):
            with _recomputed(self._base) if recomputes else nullcontext():
                yield

    @contextmanager
    def _charged(self, members: Sequence[Member]) -> Iterator[None]:
        """Counts the time of the block, in equal parts, and looks at the memory after it."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        started = time.perf_counter()
        yield
        took = (time.perf_counter() - started) / len(members)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = self._process.memory_info().rss
        for member in members:
            member.seconds += took
            member.peak_bytes = max(member.peak_bytes, peak)


@contextmanager
def _recomputed(base: PreTrainedModel) -> Iterator[None]:
    """The model with gradient checkpointing, which a trainer would turn on for good."""
    embeddings = base.get_input_embeddings()
    hooks, attributes = dict(embeddings._forward_hooks), set(base.__dict__)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    # Each time, transformers hangs a hook on the embeddings that makes the inputs differentiable,
    # which is what checkpoints of the other kind need.
    embeddings._forward_hooks.clear()
    embeddings._forward_hooks.update(hooks)
    base.train()
    try:
        yield
    finally:
        base.eval()
        base.gradient_checkpointing_disable()
        for name in set(base.__dict__) - attributes:
            del base.__dict__[name]


def _is_exhausted(error: BaseException | None) -> bool:
    return isinstance(error, FineTuningError) and error.reason == "out-of-memory"


def _alike(members: Iterable[Member]) -> list[list[Member]]:
    """Groups runs whose batches can share a pass."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        batch = member.takes()
        groups.setdefault((batch.trains, batch.drops, batch.autocast), []).append(member)
    return list(groups.values())


def _padded(batches: list[Tensor], length: int) -> Tensor:
    """Joins (sequences, own length) to (all sequences, length), padded on the right."""
    joined = batches[0].new_zeros((sum(len(batch) for batch in batches), length))
    start = 0
    for batch in batches:
        joined[start : start + len(batch), : batch.shape[1]] = batch
        start += len(batch)
    return joined
