"""What is not learnt need not go through the output head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning import attention
from optuna_lora_rl.finetuning import model_call
from optuna_lora_rl.finetuning import trainer
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.model_call import ModelCall
from optuna_lora_rl.finetuning.model_call import learnt_only

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
def untouched(model: Any, inputs: dict[str, Any], call: ModelCall) -> Any:
    yield inputs


def laid(inputs: dict[str, Any]) -> bool:
    """Whether a batch is one row of several."""
    return "position_ids" in inputs and len(inputs["input_ids"]) == 1


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
    ("changes", "dropout"),
    [
        ({}, 0.1),
        ({"gradient_checkpointing": True}, 0.1),
        ({"micro_batch_size": 3}, 0.1),
        # Rows end to end, where dropout would meet other positions.
        ({}, 0.0),
        ({"gradient_checkpointing": True}, 0.0),
    ],
)
def test_a_run_learns_the_same_with_all_positions(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], dropout: float
) -> None:
    monkeypatch.setattr(model_call, "_saves", lambda model, inputs: dropout == 0)
    tuner = make_tuner(**changes)
    chosen = {"max_steps": 4, "learning_rate": 5e-3, "lora_dropout": dropout}
    ours = tuner.run(chosen)
    monkeypatch.setattr(trainer, "learnt_only", untouched)
    theirs = tuner.run(chosen)
    for found, expected in zip(ours.curve, theirs.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "blocks"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_end_to_end_give_what_each_gives_alone(
    random_llama: Any, kernel: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_blocks, kernel = kernel == "blocks", "sdpa" if kernel == "blocks" else kernel
    model = AutoModelForCausalLM.from_pretrained(random_llama, attn_implementation=kernel).eval()
    if by_blocks:
        attention.use_blocks(model)
        assert model.config._attn_implementation == attention.BY_BLOCKS
        # Five tokens, then the others: the blocks are of whole rows.
        monkeypatch.setattr(attention, "_TOGETHER", 5)
    weight = model.model.layers[0].self_attn.k_proj.weight
    rows = [[5, 6, 7, 8, 2], [9, 2], [11, 12, 13]]
    pad, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(5 - len(row), 5)
        pad[i, where], mask[i, where] = torch.tensor(row), 1
    labels = pad.masked_fill(mask == 0, -100)
    inputs = {"input_ids": pad, "attention_mask": mask, "labels": labels}
    alone = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows])
    following = torch.tensor([token for row in rows for token in row[1:]])
    with learnt_only(model, inputs, ModelCall(end_to_end=True)) as selected:
        assert laid(selected) and selected["input_ids"].shape == (1, 10)
        assert selected["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
        assert selected.pop("shift_labels").tolist() == [following.tolist()]
        if by_blocks:
            assert selected["row_blocks"].parts == [(0, 5), (5, 10)]
        together = model(**selected).logits[0]
    # Left-padded rows begin with a token that is nobody's next: both cases learn the same ones.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    losses = [torch.nn.functional.cross_entropy(logits, following) for logits in (together, alone)]
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((50, 50, 50, 50), False),
        # The model is 32 wide: 80 x (192 + 3 x 80) is less than 200 x (192 + 3 x 50).
        ((50, 10, 10, 10), True),
        # 170 x (192 + 3 x 170) is more.
        ((50, 40, 40, 40), False),
    ],
)
def test_rows_are_laid_end_to_end_where_it_is_less_work(
    model: Any, lengths: tuple[int, ...], expected: bool
) -> None:
    mask = torch.tensor([[1] * n + [0] * (50 - n) for n in lengths])
    ids = torch.full_like(mask, 7)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    with learnt_only(model, inputs, ModelCall(end_to_end=True)) as selected:
        assert laid(selected) is expected
    with learnt_only(model, inputs) as selected:
        assert not laid(selected)
    with learnt_only(model, inputs, ModelCall(own_head=True, end_to_end=True)) as selected:
        assert selected is inputs
    # What belongs to positions as they stand is left as it is.
    inputs["token_type_ids"] = ids
    with learnt_only(model, inputs, ModelCall(end_to_end=True)) as selected:
        assert not laid(selected)


def test_it_is_used_in_training_and_fewer_positions_reach_the_head(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_call, "_saves", lambda model, inputs: True)
    tuner = make_tuner(evaluations=1)
    tuner.prepare()
    tuner.baseline()
    seen: list[float] = []
    end_to_end: list[bool] = []

    @contextmanager
    def counted(model: Any, inputs: dict[str, Any], call: ModelCall) -> Any:
        with learnt_only(model, inputs, call) as selected:
            seen.append(selected["shift_labels"].numel() / inputs["labels"].numel())
            end_to_end.append(laid(selected))
            yield selected

    monkeypatch.setattr(trainer, "learnt_only", counted)
    tuner.run({"max_steps": 2})
    assert len(seen) >= 2 and all(share < 0.6 for share in seen)
    assert all(end_to_end)
