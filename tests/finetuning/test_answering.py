"""Answers of a real, small model to held-out questions."""

from __future__ import annotations

from pathlib import Path

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions


def _tuner(train: str, **objective: object) -> FineTuner:
    return FineTuner(
        ModelOptions(),
        DataOptions(train=train, max_train_samples=8, max_validation_samples=4),
        TrainingOptions(evaluations=1),
        ObjectiveOptions(max_new_tokens=6, reference={"max_steps": 2}, **objective),  # type: ignore[arg-type]
    )


def test_every_adapter_is_asked_the_same(tmp_path: Path) -> None:
    tuner = _tuner("tiny:dates-small")
    before = tuner.answers(None, 5)
    tuner.run({"learning_rate": 1e-2, "max_steps": 4}, folder=tmp_path / "adapter")
    after, again = tuner.answers(tmp_path / "adapter", 5), tuner.answers(None, 5)
    assert before is not None and after is not None
    assert before.split == "test" and len(set(before.questions)) == 5
    assert before.questions[0].startswith("Date ") and before.expected[0]
    assert (after.questions, after.expected) == (before.questions, before.expected)
    assert after.given != before.given
    assert again == before


def test_a_metric_of_answers_asks_what_it_measures() -> None:
    said = _tuner("tiny:dates-small", metric="exact_match", generation_samples=3).answers(None, 9)
    assert said is not None and len(said.questions) == 3


def test_plain_text_asks_nothing() -> None:
    assert _tuner("tiny:sources-small").answers(None, 5) is None
