"""Packs that memory does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optuna_lora_rl.finetuning import lora
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from optuna_lora_rl.finetuning.packing import runs as side_by_side
from optuna_lora_rl.finetuning.packing.pack import Pack
from optuna_lora_rl.finetuning.trainer import Trainer
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.packing.packs import QUICK
from tests.finetuning.packing.packs import Make
from tests.finetuning.packing.packs import alone
from tests.finetuning.packing.packs import assert_same
from tests.finetuning.packing.packs import packed
from tests.finetuning.packing.packs import runs_of


def exhausted(limit: int, when: str, base: nn.Module) -> Callable[[], None]:
    """Makes passes of more than ``limit`` rows run out of memory; returns the undoing."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            if len(g) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return g

    def check(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if when == "backward":
            return Backward.apply(output) if output.requires_grad else output
        if len(output) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return output

    # Late in the pass: much of it has already been done, and dropout drawn.
    return base.model.layers[1].mlp.register_forward_hook(check).remove


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_that_memory_does_not_hold_becomes_smaller(
    make_tuner: Make, when: str, checkpointing: bool
) -> None:
    tuner = make_tuner(gradient_checkpointing=checkpointing, micro_batch_size=4)
    chosen = [{"batch_size": 4, "lora_dropout": 0.1 * i, "lora_rank": 1 + i} for i in range(7)]
    # This one does not fit at all.
    chosen.insert(2, {"batch_size": 4})
    runs = runs_of(chosen)
    tuner.prepare()
    undo = exhausted(8, when, tuner.prepared.base.model)
    try:
        outcomes, notes = packed(tuner, runs)
    finally:
        undo()
    assert notes == [
        f"memory ran out: from now on at most {n} trials share a pass" for n in (4, 2)
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_only_the_run_that_does_not_fit_fails(tuner: FineTuner, when: str) -> None:
    runs = runs_of([{"batch_size": b, "lora_dropout": 0.1} for b in (4, 4, 12, 4, 4)])
    undo = exhausted(8, when, tuner.prepared.base.model)
    try:
        outcomes, notes = packed(tuner, runs)
    finally:
        undo()
    assert "memory ran out: from now on trials take turns" in notes
    assert notes[-1] == "trial 2 runs alone: memory ran out beside others"
    assert isinstance(outcomes[2], FineTuningError) and outcomes[2].reason == "out-of-memory"
    for i in (0, 1, 3, 4):
        assert_same(outcomes[i], alone(tuner, runs[i]))


def test_the_halves_of_a_pack_are_not_in_memory_together(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits alone also ends well when the pack has to be cut to single runs."""
    held: set[int] = set()
    forward, backward = Pack._passed, Pack._go_back

    def counted_forward(pack: Any, seats: Any, before: Any) -> Any:
        trains = seats[0].takes().trains
        if trains and len(held) + len(seats) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed = forward(pack, seats, before)
        if trains:
            held.add(id(passed))
        return passed

    def counted_backward(pack: Any, passed: Any, waiting: Any) -> None:
        backward(pack, passed, waiting)
        held.remove(id(passed))

    runs = runs_of([{"lora_rank": 1 + i} for i in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_passed", counted_forward)
        patch.setattr(Pack, "_go_back", counted_backward)
        outcomes, _ = packed(tuner, runs)
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))


def crowded(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Makes losses of the third step run out of memory beside a pass of more than these rows."""
    beside, answer, loss = [0], Pack._answer, Trainer.compute_loss

    def answered(pack: Any, passed: Any) -> None:
        outer, beside[0] = beside[0], len(passed.output) if passed.output.requires_grad else 0
        answer(pack, passed)
        beside[0] = outer

    def computed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        found = loss(trainer, *args, **kwargs)
        if beside[0] > limit and trainer.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    monkeypatch.setattr(Pack, "_answer", answered)
    monkeypatch.setattr(Trainer, "compute_loss", computed)


def test_a_run_whose_own_part_found_no_room_runs_again_alone(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[int, int]] = []

    def run(number: int) -> TrialRequest:
        configuration = {**QUICK, "lora_rank": 1 + number, "batch_size": 4, "lora_dropout": 0.1}
        return TrialRequest(
            number, configuration, report=lambda n, *_: reported.append((number, n))
        )

    runs = [run(number) for number in range(4)]
    with monkeypatch.context() as patch:
        crowded(patch, limit=8)
        outcomes, notes = packed(tuner, runs)
    assert notes == [
        "memory ran out: from now on at most 2 trials run side by side",
        "trial 0 runs alone: memory ran out beside others",
    ]
    assert sorted(reported) == [(number, step) for number in range(4) for step in (2, 3)]
    for each, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, each))


def test_an_adapter_that_finds_no_room_beside_others_is_made_again(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    def placed(*args: Any) -> lora.Adapter:
        alive.append(1)
        if len(alive) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return lora.placed(*args)

    runs = runs_of([{"lora_rank": 1 + i} for i in range(4)])
    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "placed", placed)
        outcomes, notes = packed(tuner, runs)
    assert notes == [
        "memory ran out: from now on at most 2 trials run side by side",
        "trial 2 runs alone: memory ran out beside others",
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))
