"""Runs side by side give what they give alone, however each of them ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning import model_call
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from optuna_lora_rl.finetuning.trainer import Trainer
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.architectures import ARCHITECTURES
from tests.finetuning.architectures import saved_model
from tests.finetuning.packing.packs import DIVERGES
from tests.finetuning.packing.packs import MIXED
from tests.finetuning.packing.packs import QUICK
from tests.finetuning.packing.packs import Hash
from tests.finetuning.packing.packs import Make
from tests.finetuning.packing.packs import Options
from tests.finetuning.packing.packs import Pruned
from tests.finetuning.packing.packs import Write
from tests.finetuning.packing.packs import alone
from tests.finetuning.packing.packs import assert_same
from tests.finetuning.packing.packs import packed
from tests.finetuning.packing.packs import runs_of


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Optimizers that divide by a gradient's size make much of the last bits of small ones.
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=5e-4)


def assert_all_as_alone(
    tuner: FineTuner, configurations: Sequence[Options], folder: Path, **how: Any
) -> None:
    runs = runs_of(configurations, folder / "packed")
    outcomes, notes = packed(tuner, runs, **how)
    assert notes == []
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run, folder / "alone" / f"{run.number}"))
        assert_same_weights(
            folder / "packed" / f"{run.number}", folder / "alone" / f"{run.number}"
        )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of lines of very different lengths."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt.jsonl"
    lines = [f'{{"text": "{"ab " * (i % 9 + 1)}{i}"}}\n' for i in range(40)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_a_model_that_is_called_in_an_own_way_computes_by_itself_and_says_so(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer.compute_loss

    def with_positions(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        positions = torch.arange(inputs["input_ids"].shape[1])[None]
        return loss(trainer, model, {**inputs, "position_ids": positions}, *args, **kwargs)

    runs = runs_of([{"lora_rank": 2}, {"lora_rank": 3}])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", with_positions)
        outcomes, notes = packed(tuner, runs)
    reason = "its model is called with attention_mask, input_ids, position_ids"
    assert notes == [f"trial {i} runs alone: {reason}" for i in (0, 1)]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))


def test_runs_of_all_kinds_give_what_they_give_alone(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    assert_all_as_alone(tuner, MIXED, tmp_path)
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"metric": "exact_match", "max_new_tokens": 4},
        {"extra": {"loss_type": "dft"}},
        {"early_stopping_patience": 1, "evaluations": 6},
    ],
    ids=str,
)
def test_the_options_of_training_change_nothing_about_that(
    make_tuner: Make, tmp_path: Path, options: Options
) -> None:
    chosen = [MIXED[i] for i in (0, 3, 4, 5, 7, 8, 13, 14)]
    if "early_stopping_patience" in options:
        chosen = [{**c, "learning_rate": 0.3, "max_grad_norm": 0.0} for c in chosen[:4]]
        chosen.append({"max_steps": 6})
    assert_all_as_alone(make_tuner(**options), chosen, tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_texts_of_different_lengths_share_a_pass(
    make_tuner: Make,
    texts: str,
    tmp_path: Path,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Batches of one sequence have each its own length, and dropout is drawn over it: alone too
    # with its padding, for the comparison.
    monkeypatch.setattr(model_call, "_saves", lambda model, inputs: False)
    dropped = [{"batch_size": b, "lora_dropout": 0.3, "max_steps": 4} for b in (1, 1, 2, 5)]
    chosen = [{**c, "lora_rank": 2 + i} for i, c in enumerate(dropped)]
    chosen += [{"batch_size": 1}, {"init_lora_weights": "pissa", "batch_size": 2}]
    tuner = make_tuner(train=texts, max_length=40, gradient_checkpointing=checkpointing)
    assert_all_as_alone(tuner, chosen, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_base_in_half_precision_rounds_a_little_differently(
    make_tuner: Make, precision: str
) -> None:
    tuner = make_tuner(precision=precision, dtype="bfloat16")
    runs = runs_of([MIXED[i] for i in (0, 3, 5, 13)])
    for run, outcome in zip(runs, packed(tuner, runs)[0], strict=True):
        assert outcome.metrics["loss"] == pytest.approx(
            alone(tuner, run).metrics["loss"], rel=5e-3
        )


def test_chats_and_generated_answers_too(
    make_tuner: Make, write_rows: Write, tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}{'?' * (i % 5)}"},
                {"role": "assistant", "content": "yes" if i % 2 else "no"},
            ]
        }
        for i in range(30)
    ]
    tuner = make_tuner(train=write_rows(rows), metric="f1", max_new_tokens=4)
    chosen = [{}, {"lora_dropout": 0.2}, {"init_lora_weights": "olora"}, {"max_steps": 5}]
    assert_all_as_alone(tuner, chosen, tmp_path)


def test_seeds_differ_as_alone(tuner: FineTuner) -> None:
    runs = [TrialRequest(i, {**QUICK, "lora_dropout": 0.1}, seed=i % 3) for i in range(6)]
    outcomes, _ = packed(tuner, runs, size=4)
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))
    assert len({outcome.quality for outcome in outcomes}) == 3


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_the_size_of_the_pack_changes_nothing(
    tuner: FineTuner, tmp_path: Path, size: int | None
) -> None:
    assert_all_as_alone(tuner, [MIXED[i] for i in (0, 4, 7, 14)], tmp_path, size=size)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_share_their_passes(
    make_tuner: Make, make_tokenizer: Callable[[], Any], tmp_path: Path, name: str
) -> None:
    tuner = make_tuner(name=saved_model(name, ARCHITECTURES[name], make_tokenizer(), tmp_path))
    chosen: list[Options] = [
        {"lora_rank": 2},
        {"target_modules": "qv", "lora_dropout": 0.2},
        {"init_lora_weights": "pissa", "layers": "1", "lora_rank": 4},
    ]
    if name == "opt":
        # Its MLP lays all sequences end to end.
        chosen = [{**c, "target_modules": "qv"} for c in chosen]
        _, notes = packed(tuner, runs_of([{"target_modules": "mlp", "max_steps": 1}]))
        assert notes == [
            "trial 0 runs alone: model.decoder.layers.0.fc1 does not see every token of every "
            "sequence once"
        ]
    assert_all_as_alone(tuner, chosen, tmp_path)


def test_a_model_with_dropout_of_its_own_is_not_shared(
    make_tuner: Make, make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    tuner = make_tuner(name=saved_model("gpt2", {"hidden_size": 16}, make_tokenizer(), tmp_path))
    runs = runs_of([{}, {"lora_rank": 2}])
    outcomes, notes = packed(tuner, runs)
    assert notes == [
        f"trial {i} runs alone: the base model has dropout of its own" for i in range(2)
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert outcome.curve == alone(tuner, run).curve


def test_saved_adapters_load_onto_the_original_model(tuner: FineTuner, tmp_path: Path) -> None:
    runs = runs_of([MIXED[i] for i in (0, 3, 5, 13, 14, 15)], tmp_path)
    for run, outcome in zip(runs, packed(tuner, runs)[0], strict=True):
        assert run.folder is not None
        fresh = AutoModelForCausalLM.from_pretrained(tuner.model.name)
        model = PeftModel.from_pretrained(fresh, run.folder)
        found = tuner.workspace.evaluate(model, tuner.prepared.tokens.validation, None)["loss"]
        assert found == pytest.approx(outcome.metrics["loss"], rel=1e-4)


def test_one_that_diverges_and_one_that_is_pruned_leave_the_others_alone(
    make_tuner: Make, base_hash: Hash
) -> None:
    tuner = make_tuner(evaluations=3)
    before = base_hash(tuner)
    order: list[int] = []

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if step > 3:
            raise Pruned(step)

    runs = runs_of([{"max_steps": 6, "lora_rank": 1 + i} for i in range(12)])
    runs[2] = TrialRequest(2, {"max_steps": 6, "lora_dropout": 0.1, **DIVERGES})
    runs[5] = TrialRequest(5, {**QUICK, "max_steps": 6}, report=prune)
    # Its evaluation, not its training, is the first to see that it is lost.
    runs[7] = TrialRequest(7, {"max_steps": 1, **DIVERGES})
    outcomes, _ = packed(tuner, runs, done=lambda run, outcome: order.append(run.number))
    for i, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
        if i in (2, 7):
            assert isinstance(outcome, FineTuningError) and outcome.reason == "diverged"
            assert ("evaluation" if i == 7 else "training") in outcome.message
            with pytest.raises(FineTuningError) as failed:
                alone(tuner, run)
            assert outcome.message == failed.value.message
        elif i == 5:
            assert isinstance(outcome, Pruned) and outcome.args == (4,)
        else:
            assert_same(outcome, alone(tuner, run))
    # The places of those that ended were taken while the others were running.
    assert set(order[:3]) == {2, 5, 7} and set(order[-4:]) == {8, 9, 10, 11}
    assert base_hash(tuner) == before


def test_reports_are_those_of_a_run_alone_and_come_in_the_callers_thread(
    tuner: FineTuner,
) -> None:
    def report_to(reports: list[Any]) -> Callable[..., None]:
        def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
            assert threading.current_thread() is threading.main_thread()
            reports.append([step, score, *metrics.values()])

        return report

    found: list[list[Any]] = [[] for _ in range(3)]
    runs = [
        TrialRequest(i, {**QUICK, **MIXED[3 + i]}, report=report_to(found[i])) for i in range(3)
    ]
    threads = []
    packed(tuner, runs, done=lambda *ended: threads.append(threading.current_thread()))
    assert threads == [threading.main_thread()] * 3
    for run, reports in zip(runs, found, strict=True):
        expected: list[Any] = []
        tuner.run(run.configuration, report=report_to(expected))
        assert len(reports) == len(expected) == 2
        for ours, theirs in zip(reports, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_places_are_filled_as_they_become_free_and_none_means_not_now(tuner: FineTuner) -> None:
    asked: list[str] = []
    waiting = runs_of([{"max_steps": steps} for steps in (1, 4, 4, 1, 1)])
    given = 0

    def runs() -> TrialRequest | None:
        nonlocal given
        # Only one while nothing has ended; afterwards as many as are wanted.
        if given == len(waiting) or (given == 1 and "done" not in asked):
            asked.append("none")
            return None
        given += 1
        asked.append("run")
        return waiting[given - 1]

    tuner.run_packed(runs, lambda run, outcome: asked.append("done"), size=2)
    assert asked[:6] == ["run", "none", "done", "run", "run", "done"]
    assert asked.count("run") == asked.count("done") == 5
    # Having said no, one is not asked again before something has ended.
    assert "none none" not in " ".join(asked) and asked[-1] == "none"
    tuner.run_packed(lambda: None, lambda run, outcome: pytest.fail("nothing ran"))


def test_shares_of_the_time_add_up_to_no_more_than_it(tuner: FineTuner) -> None:
    began = time.perf_counter()
    outcomes, _ = packed(tuner, runs_of(MIXED[:6]))
    took = time.perf_counter() - began
    assert sum(outcome.seconds for outcome in outcomes) < took
    assert all(outcome.seconds > 0 and outcome.peak_memory_bytes > 0 for outcome in outcomes)


def test_what_cannot_run_fails_by_itself(tuner: FineTuner) -> None:
    runs = runs_of([{}, {"optim": "adam_nope"}, {"lora_rank": 0}, {"layers": "7"}, {}])
    outcomes, notes = packed(tuner, runs)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [
        None,
        "configuration",
        "configuration",
        "configuration",
        None,
    ]
    assert notes == []
    assert_same(outcomes[4], alone(tuner, runs[4]))
