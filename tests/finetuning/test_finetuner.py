from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.trainer import Trainer
from optuna_lora_rl.finetuning.trial import TrialResult
from optuna_lora_rl.finetuning.workspace import Workspace
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Hash
from tests.finetuning.runs import Make
from tests.finetuning.runs import Pruned
from tests.finetuning.runs import tuner_ready

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def test_a_run_learns_and_says_what_it_cost(tuner: FineTuner) -> None:
    reports: list[tuple[int, float, Mapping[str, float]]] = []
    result = tuner.run(
        {"max_steps": 30, "learning_rate": 1e-2},
        report=lambda step, score, metrics: reports.append((step, score, dict(metrics))),
    )
    baseline = tuner.baseline()
    assert result.quality > 0.1
    assert result.quality == pytest.approx(
        (baseline.loss - result.metrics["loss"]) / baseline.loss
    )
    assert result.score == result.quality - 0.1 * result.cost
    assert [point["step"] for point in result.curve] == [15, 30]
    assert [(step, score) for step, score, _ in reports] == [
        (point["step"], point["score"]) for point in result.curve
    ]
    assert reports[-1][1] == result.score
    assert result.steps == 30 and not result.stopped_early
    assert result.cost == result.cost_parts["estimated"]["total"]
    assert result.seconds > 0 and result.peak_memory_bytes > 0 and result.flops > 0
    json.dumps([result.curve, result.metrics, result.cost_parts])


def test_the_reference_run_costs_one(make_tuner: Make) -> None:
    tuner = make_tuner(reference={**QUICK, "lora_rank": 4})
    result = tuner.run({**QUICK, "lora_rank": 4})
    assert result.cost_parts["estimated"] == {
        "time": 1.0,
        "memory": 1.0,
        "parameters": 1.0,
        "total": 1.0,
    }
    double = tuner.run({**QUICK, "lora_rank": 8, "max_steps": 8})
    assert double.cost_parts["estimated"]["parameters"] == 2.0
    assert double.cost_parts["estimated"]["time"] > 2.0


def test_further_arguments_reach_the_trainer(make_tuner: Make, base_hash: Hash) -> None:
    noisy = tuner_ready(make_tuner(extra={"neftune_noise_alpha": 50.0}))
    before = base_hash(noisy)
    embeddings = noisy.prepared.base.model.get_input_embeddings()
    attributes = set(embeddings.__dict__)
    assert noisy.run(QUICK).quality != make_tuner().run(QUICK).quality

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    with pytest.raises(Pruned):
        noisy.run(QUICK, report=report)
    assert base_hash(noisy) == before
    assert set(embeddings.__dict__) == attributes and not embeddings._forward_hooks


def test_a_schedule_has_the_arguments_that_it_needs(make_tuner: Make) -> None:
    tuner = make_tuner(extra={"lr_scheduler_kwargs": {"min_lr": 1e-3}})
    slow = tuner.run({**QUICK, "lr_scheduler_type": "cosine_with_min_lr"})
    assert slow.steps == QUICK["max_steps"]


@pytest.mark.parametrize(
    "change",
    [
        {"loraplus_lr_ratio": 16.0},
        {"weight_decay": 0.5},
        {"warmup_ratio": 1.0},
        {"lr_scheduler_type": "constant"},
        {"max_grad_norm": 1e-3, "optim": "sgd"},
        {"lora_dropout": 0.5},
        {"lora_alpha": 64.0},
        {"use_rslora": True},
        {"use_dora": True},
        {"batch_size": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_parameter_makes_a_difference(tuner: FineTuner, change: dict[str, Any]) -> None:
    assert tuner.run({**QUICK, **change}).quality != tuner.run(QUICK).quality


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    make_tuner: Make, tuner: FineTuner, base_hash: Hash
) -> None:
    saving = make_tuner(gradient_checkpointing=True)
    before = base_hash(tuner_ready(saving))
    first, second = saving.run(QUICK), saving.run(QUICK)
    plain = tuner.run(QUICK)
    assert first.curve == second.curve
    assert first.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    assert first.bytes < plain.bytes and first.flops > plain.flops
    assert base_hash(saving) == before
    assert not saving.prepared.base.model.get_input_embeddings()._forward_hooks


def test_micro_batches_change_memory_and_nothing_else(make_tuner: Make, tuner: FineTuner) -> None:
    plain = tuner.run(QUICK)
    small = make_tuner(micro_batch_size=2).run(QUICK)
    assert small.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)
    assert small.bytes < plain.bytes


def test_equal_runs_are_equal_in_another_process(tuner: FineTuner) -> None:
    here = tuner.run(QUICK, seed=3)
    options = [
        section.model_dump_json()
        for section in (tuner.model, tuner.data, tuner.training, tuner.objective)
    ]
    code = (
        "import json, sys\n"
        "from optuna_lora_rl.finetuning import options as o\n"
        "from optuna_lora_rl.finetuning.finetuner import FineTuner\n"
        "kinds = (o.ModelOptions, o.DataOptions, o.TrainingOptions, o.ObjectiveOptions)\n"
        "made = [k.model_validate_json(s) for k, s in zip(kinds, sys.argv[1:5])]\n"
        f"result = FineTuner(*made).run({QUICK!r}, seed=3)\n"
        "print(json.dumps([result.quality, result.score]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [here.quality, here.score]
    assert ran.stderr == ""


def test_another_seed_is_another_run(tuner: FineTuner) -> None:
    assert tuner.run(QUICK, seed=1).quality != tuner.run(QUICK, seed=2).quality


def test_the_callers_random_numbers_are_left_alone(tuner: FineTuner) -> None:
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    tuner.run(QUICK)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_generated_answers_are_scored(make_tuner: Make, write_rows: Callable[..., str]) -> None:
    rows = [{"prompt": f"{a}{b}=", "completion": "ok"} for a in range(10) for b in range(5)]
    tuner = make_tuner(train=write_rows(rows), metric="exact_match", max_new_tokens=4)
    assert tuner.baseline().exact_match == 0.0
    result = tuner.run({"max_steps": 40, "learning_rate": 1e-2})
    assert result.quality == result.metrics["exact_match"] == 1.0
    assert result.metrics["accuracy"] == result.metrics["f1"] == 1.0


def test_the_test_split_waits_for_the_best(
    make_tuner: Make, sums: str, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (10, 11) for b in range(9)]
    tuner = make_tuner(test=write_rows(rows, "test.jsonl"), metric="token_accuracy")
    result = tuner.run({"max_steps": 20, "learning_rate": 1e-2}, folder=tmp_path / "a")
    found = tuner.test(tmp_path / "a")
    assert found is not None
    assert found.loss != result.metrics["loss"]
    assert found.quality > 0
    assert make_tuner().test(tmp_path / "a") is None


def test_the_untuned_model_is_measured_once(
    make_tuner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_tuner(cache=tmp_path).baseline()
    monkeypatch.setattr(Workspace, "evaluate", None)
    assert make_tuner(cache=tmp_path).baseline() == first
    with pytest.raises(TypeError):
        make_tuner(cache=tmp_path, max_validation_samples=3).baseline()


def test_runs_on_data_from_the_cache_give_the_same(make_tuner: Make, tmp_path: Path) -> None:
    alone = make_tuner().run(QUICK)
    make_tuner(cache=tmp_path).prepare()
    (entry,) = (tmp_path / "tokens").iterdir()
    before = entry.stat().st_mtime_ns
    assert make_tuner(cache=tmp_path).run(QUICK).curve == alone.curve
    assert entry.stat().st_mtime_ns == before


def test_a_damaged_cache_is_measured_again(make_tuner: Make, tmp_path: Path) -> None:
    first = make_tuner(cache=tmp_path).baseline()
    (path,) = (tmp_path / "baselines").iterdir()
    path.write_text('{"loss": 1')
    assert make_tuner(cache=tmp_path).baseline() == first


def test_measured_cost_is_relative_to_a_measured_run(make_tuner: Make, tmp_path: Path) -> None:
    tuner = make_tuner(cache=tmp_path, cost_source="measured", reference=QUICK)
    reported: list[float] = []
    result = tuner.run(QUICK, report=lambda step, score, metrics: reported.append(score))
    assert result.cost == result.cost_parts["measured"]["total"] > 0
    assert result.score == result.quality - 0.1 * result.cost
    # What it takes is known at its end only: until then the estimate is charged.
    assert reported[-1] == result.curve[-1]["score"] == pytest.approx(result.quality - 0.1)
    assert result.seconds > 0 and result.peak_memory_bytes > 0
    assert result.cost_parts["measured"]["parameters"] == 1.0
    assert result.cost_parts["estimated"]["total"] == 1.0
    assert len(list((tmp_path / "references").iterdir())) == 1


def test_a_run_says_nothing_on_the_terminal(
    tuner: FineTuner, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    tuner.run(QUICK)
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in recwarn]


def test_mixed_precision_leaves_the_base_as_it_was(make_tuner: Make, base_hash: Hash) -> None:
    tuner = make_tuner(precision="bf16", dtype="bfloat16")
    attributes = set(tuner_ready(tuner).prepared.base.model.__dict__)
    first, second = tuner.run(QUICK), tuner.run(QUICK)
    assert first.curve == second.curve
    assert first.quality > 0
    assert set(tuner.prepared.base.model.__dict__) == attributes


def test_generated_metrics_need_questions(
    make_tuner: Make, write_rows: Callable[..., str]
) -> None:
    source = write_rows([{"text": f"line {i}"} for i in range(9)])
    with pytest.raises(UserError, match=r"objective\.metric: f1 compares answers"):
        make_tuner(train=source, metric="f1").prepare()


def test_text_and_chat_train_too(make_tuner: Make, write_rows: Callable[..., str]) -> None:
    text = write_rows([{"text": f"{i} and {i + 1}"} for i in range(30)], "text.jsonl")
    chat = write_rows(
        [
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": "yes" if i % 2 else "no"},
                ]
            }
            for i in range(30)
        ],
        "chat.jsonl",
    )
    assert make_tuner(train=text).run(QUICK).quality > 0
    chatting = make_tuner(train=chat, metric="accuracy", max_new_tokens=4)
    assert math.isfinite(chatting.run(QUICK).quality)


def test_results_are_plain(tuner: FineTuner) -> None:
    result = tuner.run(QUICK)
    assert isinstance(result, TrialResult)
    for name in ("quality", "score", "cost", "seconds", "flops", "bytes"):
        assert type(getattr(result, name)) is float, name
    for name in ("steps", "trainable_parameters", "peak_memory_bytes"):
        assert type(getattr(result, name)) is int, name


def test_traits_say_what_there_is(tuner: FineTuner) -> None:
    traits = tuner.traits()
    assert traits["train_examples"] + traits["validation_examples"] == 60
    assert traits["model_layers"] == 2 and traits["hidden_size"] == 32
    assert 5 < traits["mean_tokens"] <= traits["longest_tokens"] <= 8


@pytest.mark.parametrize("rank_change", ["none", "loss"])
def test_all_of_a_model_trains_from_the_first_step(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch, rank_change: str
) -> None:
    """A base that is left as it evaluates has no dropout, and keeps all activations."""
    seen: list[set[bool]] = []
    own = Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({module.training for module in self.model.modules()})
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    make_tuner().run({"max_steps": 2, "rank_change": rank_change})
    assert seen == [{True}, {True}]


def test_checkpointed_layers_are_computed_twice(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    own = LlamaMLP.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[-1] += self.training
        return own(self, *args, **kwargs)

    tuners = [make_tuner(gradient_checkpointing=again) for again in (False, True)]
    for tuner in tuners:
        tuner.baseline()
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    for tuner in tuners:
        counts.append(0)
        tuner.run({"max_steps": 3})
    layers, steps = 2, 3
    assert counts == [steps * layers, 2 * steps * layers]
