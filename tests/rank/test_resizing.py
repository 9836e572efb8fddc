from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import resizing
from optuna_lora_rl.rank.layers import Factors
from tests.rank.conftest import drawn_factors
from tests.rank.conftest import language_loss

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def trained(peft: Any, ids: Any, steps: int = 3, kind: Any = None, **options: Any) -> Any:
    """Takes some steps, so that the optimizer has a state."""
    kind = kind or torch.optim.AdamW
    optimizer = kind([p for p in peft.parameters() if p.requires_grad], lr=1e-2, **options)
    for _ in range(steps):
        step(peft, ids, optimizer)
    return optimizer


def step(peft: Any, ids: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    language_loss(peft, ids).backward()
    optimizer.step()


@settings(max_examples=100, deadline=None)
@given(
    d=st.integers(1, 12),
    k=st.integers(1, 12),
    r=st.integers(1, 14),
    rank=st.integers(1, 14),
    directions=st.integers(0, 14),
    seed=st.integers(0, 999),
)
def test_shrinking_is_the_truncated_svd_of_the_product(
    d: int, k: int, r: int, rank: int, directions: int, seed: int
) -> None:
    rank = min(rank, r)
    a, b = drawn_factors(d, k, r, seed)
    b[:, directions:] = 0
    found = resizing.best_approximation(Factors(a, b, 0.5), rank)
    assert found.a.shape == (rank, k) and found.b.shape == (d, rank)
    u, s, vh = torch.linalg.svd((b @ a).double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    product = found.b.double() @ found.a.double()
    if len(s) <= rank or s[rank - 1] - s[rank] > 1e-2 * s[0]:
        assert torch.allclose(product, best, atol=1e-4)
    # With equal values the best approximation is not one only, but its error is.
    dense = (b @ a).double()
    error = float(torch.dist(dense, best))
    assert float(torch.dist(dense, product)) == pytest.approx(error, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    k=st.integers(2, 10),
    r=st.integers(2, 8),
    rank=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_moments_follow_as_gradients_do(k: int, r: int, rank: int, seed: int) -> None:
    rank, d = min(rank, r - 1), 9
    a, b = drawn_factors(d, k, r, seed)
    change = resizing.shrunk(Factors(a, b, 1.0), rank)
    # Of a loss with the gradient G of B A: dA = B^T G, dB = G A^T.
    gradient = torch.randn(d, k, generator=torch.Generator().manual_seed(seed + 1)).double()
    b_new, a_new = change.b.double(), change.a.double()
    assert torch.allclose(change.for_a @ (b.double().T @ gradient), b_new.T @ gradient, atol=1e-4)
    moved = gradient @ a.double().T @ change.for_b.T
    assert torch.allclose(moved, gradient @ a_new.T, atol=1e-4)


@pytest.mark.parametrize("new_rows", ["kaiming", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_growing_keeps_the_function(
    adapted: Callable[..., Any], ids: Any, new_rows: Any, use_dora: bool
) -> None:
    peft = adapted(use_dora=use_dora)
    before = peft(ids).logits
    found = resizing.resize(peft, {Q0: 9, DOWN1: 6}, new_rows=new_rows)
    assert [(one.name, one.before, one.after, one.error) for one in found] == [
        (Q0, 4, 9, 0.0),
        (DOWN1, 4, 6, 0.0),
    ]
    assert torch.allclose(peft(ids).logits, before, atol=1e-5)
    assert {name: layer.r["default"] for name, layer in layers.lora_layers(peft).items()} == {
        Q0: 9,
        "model.layers.0.mlp.down_proj": 4,
        "model.layers.1.self_attn.q_proj": 4,
        DOWN1: 6,
    }


def test_orthogonal_rows_are_new_directions(adapted: Callable[..., Any]) -> None:
    peft = adapted()
    resizing.resize(peft, {Q0: 40}, new_rows="orthogonal")
    a = layers.factors_of(layers.lora_layers(peft)[Q0]).a
    old, new = a[:4], a[4:32]
    assert (old @ new.T).abs().max() < 1e-5
    size = old.square().sum(1).mean()
    assert torch.allclose(new @ new.T, size * torch.eye(28), atol=1e-5)
    # 32 inputs have no more directions; further rows are random and of the same size.
    assert torch.allclose(a[32:].square().sum(1), size.expand(8))


def test_growing_and_shrinking_again_keeps_the_function(
    adapted: Callable[..., Any], ids: Any
) -> None:
    peft = adapted()
    before = peft(ids).logits
    resizing.resize(peft, {Q0: 12, DOWN1: 7})
    resizing.resize(peft, {Q0: 4, DOWN1: 4})
    assert torch.allclose(peft(ids).logits, before, atol=1e-4)


def test_a_layer_that_shrinks_before_training_can_still_learn(
    adapted: Callable[..., Any], ids: Any
) -> None:
    peft = adapted(random=False)
    before = peft(ids).logits
    size = layers.factors_of(layers.lora_layers(peft)[Q0]).a.square().sum(1).mean()
    resizing.resize(peft, {Q0: 2})
    factors = layers.factors_of(layers.lora_layers(peft)[Q0])
    assert torch.equal(peft(ids).logits, before)
    assert torch.allclose(factors.a.square().sum(1), size.expand(2))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_resized_adapter_reloads_in_plain_peft(
    adapted: Callable[..., Any],
    ids: Any,
    random_llama: Path,
    tmp_path: Path,
    use_rslora: bool,
    use_dora: bool,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # The patterns of others match the layers too, and must not win.
    peft = adapted(
        use_rslora=use_rslora,
        use_dora=use_dora,
        rank_pattern={"down_proj": 6},
        alpha_pattern={"down_proj": 5},
    )
    scalings = [layer.scaling["default"] for layer in layers.lora_layers(peft).values()]
    resizing.resize(peft, {Q0: 7, DOWN1: 3})
    resizing.resize(peft, {Q0: 2})
    peft.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(random_llama).eval()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(again(ids).logits, peft(ids).logits, atol=1e-5)
    found = layers.lora_layers(again).values()
    assert [layer.r["default"] for layer in found] == [2, 6, 4, 3]
    assert [layer.scaling["default"] for layer in found] == pytest.approx(scalings)


@pytest.mark.parametrize("after", [2, 7])
@pytest.mark.parametrize("loraplus", [False, True])
def test_adam_follows(adapted: Callable[..., Any], ids: Any, after: int, loraplus: bool) -> None:
    peft = adapted()
    if loraplus:
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(
            peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
        )
        for _ in range(3):
            step(peft, ids, optimizer)
    else:
        optimizer = trained(peft, ids, amsgrad=True)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    resizing.resize(peft, {Q0: after, DOWN1: after}, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    trainable = [p for p in peft.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trainable} == {id(p) for p in optimizer.state}
    for parameter in trainable:
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["step"] == 3
        assert (state["exp_avg_sq"] >= 0).all()
    before = {n: p.detach().clone() for n, p in peft.named_parameters() if p.requires_grad}
    step(peft, ids, optimizer)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter).all()
            assert not torch.equal(parameter, before[name])


def test_what_moments_new_directions_begin_with(adapted: Callable[..., Any], ids: Any) -> None:
    for new_moments in ("zero", "mean"):
        peft = adapted()
        optimizer = trained(peft, ids)
        layer = layers.lora_layers(peft)[Q0]
        old = dict(optimizer.state[layer.lora_B["default"].weight])
        resizing.resize(peft, {Q0: 6}, optimizer=optimizer, new_moments=new_moments)  # type: ignore[arg-type]
        new = optimizer.state[layer.lora_B["default"].weight]
        assert torch.equal(new["exp_avg"][:, :4], old["exp_avg"])
        assert torch.equal(new["exp_avg_sq"][:, :4], old["exp_avg_sq"])
        assert (new["exp_avg"][:, 4:] == 0).all()
        mean = old["exp_avg_sq"].mean(1, keepdim=True).expand(-1, 2)
        expected = mean if new_moments == "mean" else torch.zeros_like(mean)
        assert torch.equal(new["exp_avg_sq"][:, 4:], expected)
        peft.unload()


def test_states_of_other_shapes_begin_anew(adapted: Callable[..., Any], ids: Any) -> None:
    peft = adapted()
    optimizer = trained(peft, ids, kind=torch.optim.Adafactor)
    resizing.resize(peft, {Q0: 2}, optimizer=optimizer)
    assert layers.lora_layers(peft)[Q0].lora_A["default"].weight not in optimizer.state
    step(peft, ids, optimizer)
    assert torch.isfinite(peft(ids).logits).all()


def test_momentum_keeps_its_direction(adapted: Callable[..., Any], ids: Any) -> None:
    peft = adapted()
    optimizer = trained(peft, ids, kind=torch.optim.SGD, momentum=0.9)
    resizing.resize(peft, {Q0: 6}, optimizer=optimizer)
    weight = layers.lora_layers(peft)[Q0].lora_A["default"].weight
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert buffer.shape == weight.shape
    assert (buffer[4:] == 0).all() and (buffer[:4] != 0).any()


def test_what_cannot_be_resized_is_said_and_nothing_changes(
    adapted: Callable[..., Any], ids: Any
) -> None:
    peft = adapted()
    for ranks, says in (
        ({Q0: 2, "nowhere": 2}, "no layer 'nowhere'"),
        ({Q0: 2, DOWN1: 0}, "at least 1, not 0"),
    ):
        with pytest.raises(UserError, match=says):
            resizing.resize(peft, ranks)
        assert layers.lora_layers(peft)[Q0].r["default"] == 4
    peft.merge_adapter()
    with pytest.raises(UserError, match="while the adapter is merged"):
        resizing.resize(peft, {Q0: 2})


def test_factors_that_are_not_free_cannot_be_resized(adapted: Callable[..., Any]) -> None:
    peft = adapted(init_lora_weights="mica", random=False)
    with pytest.raises(UserError, match="MiCALinearVariant fixes"):
        resizing.resize(peft, {Q0: 2})
