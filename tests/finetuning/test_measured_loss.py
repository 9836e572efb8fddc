"""What an evaluation measures: plain cross-entropy over all learnt tokens, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.architectures import saved_model
from tests.finetuning.packing.packs import packed
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Make

Write = Callable[..., str]
# The training loss of each is another one than cross-entropy.
TRAINED = [{"loss_type": "dft"}, {"label_smoothing_factor": 0.3}]
# Answers and texts of very different lengths, so that a mean over batches is not one over tokens.
ROWS = [{"prompt": f"{i}=", "completion": "ab" * (1 + i % 11) + str(i)} for i in range(40)]


@pytest.fixture
def uneven(write_rows: Write) -> str:
    return write_rows(ROWS)


def measured_by_hand(tuner: FineTuner, adapter: Path | None, split: str) -> tuple[float, float]:
    """Loss and accuracy by a plain loop over rows, in a model loaded as its users do."""
    model: Any = AutoModelForCausalLM.from_pretrained(tuner.model.name, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    loss, right, count = 0.0, 0, 0
    for row in getattr(tuner.prepared.tokens, split):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        loss += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != -100).sum())
    return loss / count, right / count


def assert_measures(tuner: FineTuner, adapter: Path, metrics: dict[str, float]) -> None:
    loss, accuracy = measured_by_hand(tuner, adapter, "validation")
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(accuracy)
    untuned, untuned_accuracy = measured_by_hand(tuner, None, "validation")
    baseline = tuner.baseline()
    assert baseline.loss == pytest.approx(untuned, rel=1e-5)
    assert baseline.token_accuracy == pytest.approx(untuned_accuracy)


@pytest.mark.parametrize(("extra", "size"), [({}, 1), *((extra, 7) for extra in TRAINED)], ids=str)
def test_loss_and_accuracy_are_means_over_tokens_of_the_model_alone(
    make_tuner: Make, uneven: str, tmp_path: Path, extra: dict[str, Any], size: int
) -> None:
    tuner = make_tuner(train=uneven, max_length=32, extra=extra, eval_batch_size=size)
    result = tuner.run({**QUICK, "lora_dropout": 0.3}, folder=tmp_path / "adapter")
    assert_measures(tuner, tmp_path / "adapter", result.metrics)
    assert result.quality == pytest.approx(
        1 - result.metrics["loss"] / measured_by_hand(tuner, None, "validation")[0], abs=1e-5
    )


@pytest.mark.parametrize("extra", TRAINED, ids=str)
def test_trials_side_by_side_measure_the_same(
    make_tuner: Make, uneven: str, tmp_path: Path, extra: dict[str, Any]
) -> None:
    tuner = make_tuner(train=uneven, max_length=32, extra=extra, eval_batch_size=7)
    runs = [
        TrialRequest(i, {**QUICK, "lora_rank": 2 + i}, folder=tmp_path / str(i)) for i in range(2)
    ]
    for run, outcome in zip(runs, packed(tuner, runs)[0], strict=True):
        assert run.folder is not None
        assert_measures(tuner, run.folder, outcome.metrics)


def test_test_split_and_cut_adapters_are_measured_alike(
    make_tuner: Make, uneven: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = [{**row, "prompt": f"{row['prompt']}?"} for row in ROWS]
    tuner = make_tuner(
        train=uneven,
        test=write_rows(rows, "test.jsonl"),
        max_length=32,
        eval_batch_size=7,
        extra={"loss_type": "dft"},
    )
    result = tuner.run(QUICK, folder=tmp_path / "adapter")
    tested = tuner.test(tmp_path / "adapter")
    assert tested is not None
    loss, accuracy = measured_by_hand(tuner, tmp_path / "adapter", "test")
    assert tested.loss == pytest.approx(loss, rel=1e-5)
    assert tested.token_accuracy == pytest.approx(accuracy)
    assert tuner.cut(tmp_path / "adapter")[-1] == pytest.approx(result.quality, abs=1e-5)


def test_early_evaluations_of_a_part_are_measured_alike(make_tuner: Make, uneven: str) -> None:
    curves = []
    for size in (1, 32):
        tuner = make_tuner(
            train=uneven,
            max_length=32,
            first_evaluation=0.5,
            eval_batch_size=size,
            validation_fraction=0.5,
        )
        curves.append([point["quality"] for point in tuner.run(QUICK).curve])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_routers_loss_is_trained_and_not_measured(
    make_tuner: Make,
    make_tokenizer: Callable[[], Any],
    uneven: str,
    tmp_path: Path,
    side_by_side: bool,
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    name = saved_model("mixtral", {**sizes, **experts}, make_tokenizer(), tmp_path)
    coefficient = {"router_aux_loss_coef": 1.0}
    tuner = make_tuner(name=name, train=uneven, max_length=32, extra=coefficient)
    runs = [TrialRequest(0, {**QUICK, "target_modules": "qv"}, folder=tmp_path / "adapter")]
    if side_by_side:
        (result,), _ = packed(tuner, runs)
    else:
        result = tuner.run(runs[0].configuration, folder=runs[0].folder)
    assert_measures(tuner, tmp_path / "adapter", result.metrics)
    # The load-balancing loss of four experts is at least one.
    assert result.curve[0]["train_loss"] > result.metrics["loss"] + 0.8


def test_rows_that_training_drops_are_measured(make_tuner: Make, uneven: str) -> None:
    kept = make_tuner(train=uneven, max_length=32, eval_batch_size=3)
    dropping = make_tuner(
        train=uneven, max_length=32, eval_batch_size=3, extra={"dataloader_drop_last": True}
    )
    assert dropping.baseline().loss == kept.baseline().loss


def test_a_row_without_a_finite_loss_is_not_left_out(
    make_tuner: Make, random_llama: Path, uneven: str, write_rows: Write, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    tuner = make_tuner(train=uneven, max_length=32)
    token = tuner.prepared.base.tokenizer.convert_tokens_to_ids("~")
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num())
    model.save_pretrained(tmp_path / "broken")
    tuner.prepared.base.tokenizer.save_pretrained(tmp_path / "broken")
    rows: Sequence[dict[str, Any]] = [{"prompt": f"{i}", "completion": "ab"} for i in range(6)]
    validation = write_rows([*rows, {"prompt": "~", "completion": "ab"}], "validation.jsonl")
    broken = make_tuner(
        name=str(tmp_path / "broken"), train=uneven, validation=validation, eval_batch_size=1
    )
    with pytest.raises(FineTuningError, match="evaluation loss was nan"):
        broken.run(QUICK)


@pytest.mark.parametrize(
    "extra", [{"logging_strategy": "no"}, {"logging_first_step": True}], ids=str
)
def test_what_is_logged_does_not_change_how_ranks_change(
    make_tuner: Make, extra: dict[str, Any]
) -> None:
    # Whatever the course, it is a plateau: ranks grow as soon as there are three losses.
    loss = {"every": 2, "window": 3, "plateau": 0.9, "calm": 0.8, "oscillation": 0.9}
    configuration = {"max_steps": 10, "rank_change": "loss", "learning_rate": 1e-3}
    options = {"rank_change": {"loss": loss}}
    expected = make_tuner(**options).run(configuration)
    found = make_tuner(**options, extra=extra).run(configuration)
    assert found.rank_changes == expected.rank_changes
    assert expected.rank_changes
