"""What a pack leaves behind, however it ends: nothing."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult
from tests.finetuning.packing.packs import DIVERGES
from tests.finetuning.packing.packs import MIXED
from tests.finetuning.packing.packs import QUICK
from tests.finetuning.packing.packs import Hash
from tests.finetuning.packing.packs import Pruned
from tests.finetuning.packing.packs import assert_same
from tests.finetuning.packing.packs import packed
from tests.finetuning.packing.packs import runs_of


def traces(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that a run might leave on a model."""
    found = {}
    for name, module in model.named_modules():
        kept = {}
        for key, value in module.__dict__.items():
            if key == "_modules":
                value = {child: id(its) for child, its in value.items()}
            elif key in ("_parameters", "_buffers"):
                value = {
                    own: None if its is None else (id(its), its.requires_grad, its.grad is None)
                    for own, its in value.items()
                }
            elif isinstance(value, dict):
                value = dict(value)
            elif callable(value) and not isinstance(value, type):
                value = getattr(value, "__qualname__", id(value))
            kept[key] = value
        found[name] = kept
    return found


class World:
    """What a run may not change outside of itself."""

    def __init__(self, tuner: FineTuner, base_hash: Hash) -> None:
        self._tuner = tuner
        self._hash = base_hash
        self._before = self._look()

    def assert_unchanged(self) -> None:
        found = self._look()
        for name, expected in self._before.items():
            assert found[name] == expected, name

    def _look(self) -> dict[str, Any]:
        model = self._tuner.prepared.base.model
        gc.collect()
        return {
            "weights": self._hash(self._tuner),
            "traces": traces(model),
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "python": random.getstate(),
            "numpy": [str(part) for part in np.random.get_state()],
            "torch": torch.get_rng_state().tolist(),
            "gradients": dict(GradientState._shared_state),
            "threads": threading.enumerate(),
            "frozen": gc.get_freeze_count() > 0,
            "grad mode": torch.is_grad_enabled(),
        }


@pytest.fixture
def world(tuner: FineTuner, base_hash: Hash) -> Iterator[World]:
    # The first run of a process leaves what all later ones find.
    packed(tuner, runs_of([{}]))
    yield World(tuner, base_hash)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_pack_stays(
    tuner: FineTuner, world: World, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    changed = tuner.training.model_copy(update={"gradient_checkpointing": checkpointing})
    monkeypatch.setattr(tuner.workspace, "training", changed)
    packed(tuner, runs_of([MIXED[i] for i in (0, 4, 13, 15)]), size=3)
    world.assert_unchanged()


@pytest.mark.parametrize("where", ["report", "runs", "done", "error in done", "error in runs"])
def test_nothing_stays_of_a_pack_that_is_interrupted(
    tuner: FineTuner, world: World, where: str
) -> None:
    error = KeyError("broken") if "error" in where else KeyboardInterrupt()
    ended: list[int] = []
    begun = 0

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if where == "report" and step == 3:
            raise error

    def runs() -> TrialRequest | None:
        nonlocal begun
        if "runs" in where and begun == 5:
            raise error
        begun += 1
        chosen = MIXED[(4, 13, 0, 5, 8)[begun % 5]]
        return TrialRequest(begun, {**QUICK, "max_steps": 6, **chosen}, report=report)

    def done(run: TrialRequest, outcome: Any) -> None:
        ended.append(run.number)
        if "done" in where:
            raise error

    with pytest.raises(type(error)) as raised:
        tuner.run_packed(runs, done, size=4)
    assert raised.value is error
    # The others were given up without a word.
    assert len(ended) == (4 if "runs" in where else 1)
    del raised
    error.__traceback__ = None
    world.assert_unchanged()
    outcomes, _ = packed(tuner, runs_of([{}]))
    assert_same(outcomes[0], tuner.run(QUICK))


def test_nothing_of_a_packed_run_stays_in_memory(tuner: FineTuner) -> None:
    from peft.tuners.lora import LoraLayer
    from trl import SFTTrainer

    def living() -> list[Any]:
        gc.collect()
        return [t for t in gc.get_objects() if isinstance(t, SFTTrainer | LoraLayer)]

    def added() -> list[type]:
        return [type(t) for t in living() if t not in before]

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    # What an earlier test's failure holds may go at any time; what comes must not stay.
    before, between = weakref.WeakSet(living()), []
    waiting = [
        *runs_of([{}]),
        TrialRequest(1, {**QUICK, **DIVERGES}),
        TrialRequest(2, QUICK, report=prune),
    ]
    outcomes: list[Any] = []

    def runs() -> TrialRequest | None:
        between.append(added())
        return waiting[len(outcomes)] if len(outcomes) < len(waiting) else None

    tuner.run_packed(runs, lambda run, outcome: outcomes.append(outcome), size=1)
    assert [type(outcome) for outcome in outcomes] == [TrialResult, FineTuningError, Pruned]
    # Each is gone before the next one comes.
    assert between == [[]] * 4
    assert added() == []


def test_many_trials_leave_no_more_than_few(tuner: FineTuner) -> None:
    def run(count: int, size: int) -> None:
        packed(tuner, runs_of([MIXED[i % len(MIXED)] for i in range(count)]), size=size)

    def living() -> tuple[int, int]:
        gc.collect()
        things = gc.get_objects()
        return sum(isinstance(t, torch.Tensor) for t in things), len(things)

    run(8, 4)
    tensors, objects = living()
    run(16, 4)
    later_tensors, later_objects = living()
    assert later_tensors <= tensors
    # Libraries remember a little in bounded caches; a trial of this model is thousands.
    assert later_objects - objects < 16 * 20


def test_another_error_in_a_shared_pass_is_a_bug_and_says_so(
    tuner: FineTuner, world: World
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("in the base model")

    handle = tuner.prepared.base.model.model.layers[1].register_forward_hook(broken)
    try:
        with pytest.raises(ZeroDivisionError):
            packed(tuner, runs_of([{}, {}]))
    finally:
        handle.remove()
    world.assert_unchanged()
