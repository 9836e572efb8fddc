"""What is not learnt need not go through the output head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning import trainer
from optuna_lora_rl.finetuning.learnt import learnt_only
from optuna_lora_rl.finetuning.trial import FineTuner

Make = Callable[..., FineTuner]
LABELS = [[-100, -100, 7, 8, 2], [-100, 9, 2, -100, -100], [-100, -100, -100, -100, -100]]


@pytest.fixture(scope="module")
def model(random_llama: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(random_llama).eval()


@pytest.fixture
def batch() -> dict[str, Any]:
    labels = torch.tensor(LABELS)
    ids = labels.clamp(min=5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def untouched(model: Any, inputs: dict[str, Any]) -> Any:
    yield inputs


def test_the_loss_and_its_gradient_are_the_same(model: Any, batch: dict[str, Any]) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = model(**batch)
    (their,) = torch.autograd.grad(expected.loss, weight, retain_graph=True)
    with learnt_only(model, batch) as selected:
        # Only TRL's patched forward makes a loss of it by itself.
        labels = selected.pop("shift_labels")
        found = model(**selected)
    loss = torch.nn.functional.cross_entropy(found.logits[0], labels[0])
    (our,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)
    # Five tokens are learnt: two completions with their ends.
    assert found.logits.shape[:2] == (1, 5)
    learnt = torch.cat([expected.logits[0, 1:4], expected.logits[1, 0:2]])
    torch.testing.assert_close(found.logits[0], learnt, rtol=1e-5, atol=1e-6)


def test_the_batch_and_the_backbone_are_left_as_they_were(
    model: Any, batch: dict[str, Any]
) -> None:
    backbone, before = model.model, dict(batch)
    assert "forward" not in backbone.__dict__
    with pytest.raises(ZeroDivisionError):
        with learnt_only(model, batch) as selected:
            assert "labels" not in selected and "forward" in backbone.__dict__
            raise ZeroDivisionError
    assert "forward" not in backbone.__dict__
    assert batch.keys() == before.keys() and all(batch[key] is before[key] for key in before)
    # A patch of somebody else's stays.
    patched = backbone.forward
    backbone.forward = patched
    try:
        with learnt_only(model, batch):
            assert backbone.forward is not patched
        assert backbone.__dict__["forward"] is patched
    finally:
        del backbone.forward


@pytest.mark.parametrize("labels", [None, [[-100] * 5] * 3], ids=["none", "nothing learnt"])
def test_a_batch_with_nothing_to_select_passes(
    model: Any, batch: dict[str, Any], labels: list[list[int]] | None
) -> None:
    given = {**batch, "labels": None if labels is None else torch.tensor(labels)}
    with learnt_only(model, given) as selected:
        assert selected is given and "forward" not in model.model.__dict__


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"micro_batch_size": 3}]
)
def test_a_run_learns_the_same_with_all_positions(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    tuner = make_tuner(**changes)
    chosen = {"max_steps": 4, "learning_rate": 5e-3, "lora_dropout": 0.1}
    ours = tuner.run(chosen)
    monkeypatch.setattr(trainer, "learnt_only", untouched)
    theirs = tuner.run(chosen)
    for found, expected in zip(ours.curve, theirs.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5, abs=1e-5)


def test_it_is_used_in_training_and_fewer_positions_reach_the_head(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make_tuner(evaluations=1)
    tuner.prepare()
    tuner.baseline()
    seen: list[int] = []

    @contextmanager
    def counted(model: Any, inputs: dict[str, Any]) -> Any:
        with learnt_only(model, inputs) as selected:
            seen.append(selected["shift_labels"].numel() / inputs["labels"].numel())
            yield selected

    monkeypatch.setattr(trainer, "learnt_only", counted)
    tuner.run({"max_steps": 2})
    assert len(seen) >= 2 and all(share < 0.6 for share in seen)
