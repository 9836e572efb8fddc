"""Runs that end before they are whole, or never begin."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Hash
from tests.finetuning.runs import Make
from tests.finetuning.runs import Pruned

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def test_a_pruned_run_ends_at_once_and_leaves_the_base_as_it_was(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    steps: list[int] = []

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        steps.append(step)
        raise Pruned

    with pytest.raises(Pruned):
        tuner.run({**QUICK, "init_lora_weights": "pissa"}, report=report, folder=tmp_path)
    assert steps == [2]
    assert base_hash(tuner) == before
    assert not (tmp_path / "adapter_config.json").exists()


def test_even_an_interrupt_leaves_the_base_as_it_was(tuner: FineTuner, base_hash: Hash) -> None:
    before = base_hash(tuner)

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.run({**QUICK, "init_lora_weights": "olora"}, report=report)
    assert base_hash(tuner) == before


@pytest.mark.parametrize("ending", ["whole", "pruned", "failed"])
def test_nothing_of_a_run_stays_in_memory(tuner: FineTuner, ending: str) -> None:
    from peft.tuners.lora import LoraLayer
    from trl import SFTTrainer

    def living() -> list[type]:
        kinds = [type(thing) for thing in gc.get_objects()]
        return [kind for kind in kinds if issubclass(kind, SFTTrainer | LoraLayer)]

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if ending == "pruned":
            raise Pruned

    fast = {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"}
    kept: BaseException | None = None
    # What earlier tests left behind.
    gc.collect()
    before = living()
    try:
        tuner.run({**QUICK, **(fast if ending == "failed" else {})}, report=report)
    except (Pruned, FineTuningError) as error:
        kept = error
    assert living() == before
    assert (kept is None) == (ending == "whole")


def test_a_diverging_run_is_stopped_as_soon_as_it_is_seen(
    tuner: FineTuner, base_hash: Hash
) -> None:
    before = base_hash(tuner)
    reported: list[int] = []
    with pytest.raises(FineTuningError) as failed:
        tuner.run(
            {"max_steps": 100, "learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"},
            report=lambda step, score, metrics: reported.append(step),
        )
    assert failed.value.reason == "diverged"
    assert "step" in failed.value.message
    assert reported == []
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_running_out_of_memory_is_told_apart(
    tuner: FineTuner, base_hash: Hash, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from trl import SFTTrainer

    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise error

    before = base_hash(tuner)
    monkeypatch.setattr(SFTTrainer, "training_step", exhausted)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, "init_lora_weights": "pissa"})
    assert failed.value.reason == "out-of-memory"
    assert failed.value.message
    assert base_hash(tuner) == before


def test_any_other_failure_keeps_its_message(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(FineTuningError) as failed:
        tuner.run(QUICK)
    assert failed.value.reason == "error"
    assert failed.value.message == "KeyError: 'gone'"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"init_lora_weights": "pissa", "lora_rank": 64}, "has only 16 for lora_rank 64"),
        ({"target_modules": "everything"}, "it is one of qv"),
        ({"layers": "7"}, "the layers 0 to 1"),
        ({"optim": "adam_nope"}, "optim 'adam_nope' is unknown; it is one of adamw_torch, "),
        ({"lr_scheduler_type": "zigzag"}, "'zigzag' is unknown; it is one of linear, cosine, "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs other training.extra.lr_scheduler_"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs other training.extra.lr_scheduler_"),
    ],
)
def test_impossible_parameters_fail_as_configuration(
    tuner: FineTuner, base_hash: Hash, parameters: dict[str, Any], words: str
) -> None:
    before = base_hash(tuner)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, **parameters})
    assert failed.value.reason == "configuration"
    assert words in failed.value.message
    assert base_hash(tuner) == before


def test_a_run_that_stagnates_stops_and_costs_less(make_tuner: Make) -> None:
    tuner = make_tuner(evaluations=8, early_stopping_patience=2)
    # Far too slow: no evaluation is better than the first.
    slow = {"max_steps": 64, "learning_rate": 1e-12}
    result = tuner.run(slow)
    assert result.stopped_early and result.steps == 3 * 64 / 8
    qualities = [point["quality"] for point in result.curve]
    assert max(qualities) == qualities[0] and len(qualities) == 3
    assert result.quality == qualities[-1]
    whole = make_tuner(evaluations=8).run(slow)
    assert result.cost_parts["estimated"]["time"] == pytest.approx(
        whole.cost_parts["estimated"]["time"] * result.steps / 64
    )


def test_trackers_follow_a_run_and_close_when_it_is_pruned(
    make_tuner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    closed: list[bool] = []
    close = SummaryWriter.close
    monkeypatch.setattr(
        SummaryWriter, "close", lambda writer: (closed.append(True), close(writer))[1]
    )
    tuner = make_tuner(report_to=["tensorboard"])
    tuner.run(QUICK, folder=tmp_path / "whole", trackers_name="trial-0")
    assert closed == [True]
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    with pytest.raises(Pruned):
        tuner.run(QUICK, folder=tmp_path / "pruned", report=prune)
    assert closed == [True, True]
    with pytest.raises(FineTuningError):
        tuner.run({**QUICK, "learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"})
    assert closed == [True, True, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_sets": {"mine": ["q_porj"]}}, "target_sets.mine: this llama model has no"),
        ({"target_sets": {"qv": ["q_proj"]}}, "target_sets.qv is the name of a preset"),
        ({"reference": {"lora_rank": 0}}, "objective.reference: lora_rank: 0"),
        ({"reference": {"optim": "adam"}}, "objective.reference: optim 'adam' is unknown"),
        ({"reference": {"rank": 4}}, "objective.reference: rank"),
        ({"metric": "f1", "max_new_tokens": 500}, "leaves no room for a prompt"),
        ({"precision": "fp16", "use_cpu": None}, "training.precision fp16 needs a GPU"),
        ({"packing": True, "use_cpu": None}, "attn_implementation flash_attention_2"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"name": "./no-such-folder"}, "model.name: there is no folder './no-such-folder'"),
        ({"max_length": 2}, "data.max_length: within 2 tokens no"),
    ],
)
def test_what_cannot_work_is_said_before_any_trial(
    make_tuner: Make, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        make_tuner(**options).prepare()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_several_gpus_in_one_process_are_refused(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="2 GPUs are visible to one process"):
        make_tuner(use_cpu=None).prepare()


def test_an_optimizer_that_is_not_installed_fails_before_training(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, "optim": "adamw_bnb_8bit"})
    assert failed.value.reason == "configuration"
