# The names of fixtures are those of arguments.
# ruff: noqa: F811
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import advisor
from optuna_lora_rl.finetuning.advisor import Workload
from optuna_lora_rl.finetuning.advisor import advise
from optuna_lora_rl.rank import allocation
from optuna_lora_rl.rank import capacity
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import spectrum
from tests.rank.conftest import adapted  # noqa: F401
from tests.rank.conftest import ids  # noqa: F401
from tests.rank.conftest import language_loss
from tests.rank.conftest import model  # noqa: F401

SMALL = Workload(batch_size=2, length=16)


def test_harder_tasks_begin_with_more_rank(model: Any) -> None:
    found = [advise(model, complexity=c, workload=SMALL) for c in advisor.RANKS]
    assert [one.rank for one in found] == [8, 16, 64]
    assert [one.alpha for one in found] == [16, 32, 128]
    for one in found:
        assert all(one.reasons)
        assert one.reasons[0].startswith(f"rank {one.rank}: where tasks of")


def test_few_examples_halve_the_rank(model: Any) -> None:
    found = advise(model, workload=Workload(examples=200))
    assert found.rank == 8
    assert "200 examples are few" in found.reasons[1]


def test_no_adapter_is_larger_than_its_weight(model: Any) -> None:
    found = advise(model, complexity="high", workload=SMALL)
    for name, shape in layers.shapes_of(model).items():
        assert found.ranks[name] == capacity.break_even(shape) < 64
    assert any("narrow layers" in reason for reason in found.reasons)


def test_the_rank_is_the_largest_that_fits(model: Any) -> None:
    whole = advise(model, workload=SMALL)
    bound = 0.9 * whole.memory.total / 1e9
    found = advise(model, workload=SMALL, memory_gb=bound)
    assert 1 <= found.rank < 16
    assert any("does not fit" in reason for reason in found.reasons)

    def needs(rank: int) -> float:
        ranks = dict.fromkeys(layers.shapes_of(model), rank)
        return advisor.memory_of(model, ranks, SMALL).total / 1e9

    assert needs(found.rank) <= bound < needs(found.rank + 1)
    assert advise(model, workload=SMALL, memory_gb=1.0).rank == 16


def test_ranks_follow_importance(model: Any) -> None:
    weight = allocation.importance_of_spectra(spectrum.of_weights(model))
    found = advise(model, complexity="low", workload=SMALL, importance=weight)
    assert sum(found.ranks.values()) == 8 * 14
    assert len(set(found.ranks.values())) > 1
    assert (
        found.patterns.rank_pattern["^model\\.layers\\.0\\.mlp\\.up_proj"]
        == (found.ranks["model.layers.0.mlp.up_proj"])
    )


def test_ranks_by_importance_stay_within_the_memory(model: Any) -> None:
    names = list(layers.shapes_of(model))
    # All of it for the layers whose ranks take the most.
    found = {name: 5.0 if "mlp" in name else 1.0 for name in names}
    alike = advise(model, complexity="low", workload=SMALL)
    bound = alike.memory.total / 1e9
    shared = advise(model, complexity="low", workload=SMALL, memory_gb=bound, importance=found)
    assert len(set(shared.ranks.values())) > 1
    assert shared.memory.factors <= alike.memory.factors


def test_a_useless_rank_is_not_said_to_fit(model: Any) -> None:
    assert "any rank fits" in " ".join(advise(model, workload=SMALL, memory_gb=8).reasons)


def test_memory_is_what_training_holds(model: Any, adapted: Callable[..., Any], ids: Any) -> None:
    names = [n for n in layers.shapes_of(model) if n.endswith(("q_proj", "down_proj"))]
    counted = advisor.memory_of(model, dict.fromkeys(names, 4), SMALL)
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    peft = adapted()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    language_loss(peft, ids).backward()
    optimizer.step()

    def held(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert counted.base == base
    assert counted.factors == held(trained)
    assert counted.gradients == held(p.grad for p in trained)
    assert counted.moments == held(
        value for state in optimizer.state.values() for value in state.values() if value.ndim
    )
    assert counted.activations > 0


def test_activations_cover_what_the_graph_keeps(
    model: Any, adapted: Callable[..., Any], ids: Any
) -> None:
    names = list(layers.shapes_of(model))
    workload = Workload(batch_size=2, length=10)
    counted = advisor.memory_of(model, dict.fromkeys(names, 4), workload).activations
    peft = adapted(target_modules="all-linear")
    fixed = {p.data_ptr() for p in peft.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        language_loss(peft, ids)
    assert sum(kept.values()) < counted < 3 * sum(kept.values())


def test_a_review_tells_stagnant_from_overfitting() -> None:
    falling = [1.0, 0.9, 0.8, 0.7]
    assert advisor.review(falling, falling) is None
    assert advisor.review(falling[:2], falling[:2]) is None
    assert "overfitting" in (advisor.review(falling, [1.0, 1.0, 1.1, 1.2]) or "")
    assert "stagnant" in (advisor.review([1.0] * 4, [1.2] * 4) or "")


def test_bad_input_is_one_sentence(model: Any) -> None:
    with pytest.raises(UserError, match="complexity is one of low, medium, high, not 'huge'"):
        advise(model, complexity="huge")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no layer 'nowhere'"):
        advise(model, names=["nowhere"])
    with pytest.raises(UserError, match=r"less than the .* take a smaller model or batch"):
        advise(model, memory_gb=1e-9)
    with pytest.raises(UserError, match="2 training losses and 1 evaluation"):
        advisor.review([1, 2], [1])
