from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning import attention
from optuna_lora_rl.finetuning import heads
from optuna_lora_rl.finetuning.products import cast_once
from optuna_lora_rl.finetuning.products import kept


class Two(nn.Module):
    """Two layers with one input, as queries and keys have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 32), nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x)], dim=-1)


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q", "k"], **changes})
    model = get_peft_model(Two(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def outcome(model: Any, x: torch.Tensor, *, mixed: bool = True) -> list[torch.Tensor]:
    """The outputs, and the gradients of the input and of all that is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        y = model(x + 0)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}],
)
def test_outputs_and_gradients_are_pefts(changes: dict[str, Any]) -> None:
    model, x = adapted(**changes), torch.randn(2, 7, 24)
    plain = outcome(model, x)
    with cast_once(model):
        # The layers have one input, which shows in the first pass.
        first, found = outcome(model, x), outcome(model, x)
        exact = outcome(model, x, mixed=False)
    for ours, theirs in zip([*first, *found], [*plain, *plain], strict=True):
        assert ours.dtype == theirs.dtype
        scale = float(theirs.detach().float().abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=0.02)
    # Without autocast nothing is changed, and afterwards nothing is left.
    for ours, theirs in zip(exact, outcome(model, x, mixed=False), strict=True):
        assert torch.equal(ours, theirs)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_adapter_that_is_off_adds_nothing() -> None:
    model, x = adapted(), torch.randn(5, 24)
    base = model.get_base_model()
    with cast_once(model), torch.autocast("cpu", dtype=torch.bfloat16):
        with model.disable_adapter():
            off = model(x)
        assert torch.equal(off[:, :32], base.q.base_layer(x))
        assert torch.equal(off[:, 32:], base.k.base_layer(x))


def test_layers_with_one_input_are_one_step_from_the_second_pass_on() -> None:
    model, x = adapted(), torch.randn(5, 24, requires_grad=True)
    base = model.get_base_model()

    def steps(*layers: nn.Module) -> int:
        return len({layer(x).grad_fn for layer in layers})

    with cast_once(model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert steps(base.q, base.k) == 2
        assert steps(base.q, base.k) == 1
        # With another input each computes alone.
        q = base.q(x)
        k = base.k(x + 1)
        assert q.grad_fn is not k.grad_fn
        torch.testing.assert_close(k, base.k(x + 1))
        # One whose output nobody used sends nothing back.
        (whole,) = torch.autograd.grad(base.q(x).float().sum(), x)
        base.q.set_adapter("default")
        with model.disable_adapter():
            base.k(x)
        (alone,) = torch.autograd.grad(base.q(x).float().sum(), x)
        assert torch.equal(whole, alone)


def test_each_layer_drops_of_its_own_input() -> None:
    model, x = adapted(lora_dropout=0.4), torch.randn(2, 7, 24)
    base = model.get_base_model()
    base.k.lora_dropout["default"] = nn.Dropout(0.2)
    with cast_once(model):
        first, found = outcome(model, x), outcome(model, x)
    # The same in float32, step by step.
    model.zero_grad()
    own = x.clone().requires_grad_()
    torch.manual_seed(1)
    made = []
    for layer, drops in ((base.q, 0.4), (base.k, 0.2)):
        left = own * kept(x.view(14, 24), drops).view(x.shape) / (1 - drops)
        update = left @ layer.lora_A["default"].weight.mT @ layer.lora_B["default"].weight.mT
        made.append(layer.base_layer(own) + layer.scaling["default"] * update)
    y = torch.cat(made, dim=-1)
    y.square().sum().backward()
    assert own.grad is not None
    trained = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    plain = [y.detach(), own.grad, *trained]
    for ours, theirs in zip([*first, *found], [*plain, *plain], strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.float() / scale, theirs / scale, rtol=0, atol=0.02)
    # In evaluation nothing drops out.
    model.eval()
    with cast_once(model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), model(x + 0))


@pytest.mark.parametrize("drops", [0.0, 0.1, 0.5, 0.999])
def test_what_dropout_leaves_is_drawn_with_its_probability(drops: float) -> None:
    torch.manual_seed(0)
    drawn = kept(torch.empty(997, 1003), drops)
    apart = (drawn.float().mean() - (1 - drops)).abs()
    assert apart <= 4 * math.sqrt(drops * (1 - drops) / drawn.numel()) + 2**-16
    # Of the four places that one number decides on, each as often, and each for itself.
    places = drawn.flatten()[: 4 * 249_000].view(-1, 4).float()
    assert ((places.mean(0) - (1 - drops)).abs() < 0.004).all()
    if drops == 0.5:
        together = (places - 0.5).mT @ (places - 0.5) / len(places)
        assert (together.fill_diagonal_(0).abs() < 0.002).all()


def test_checkpoints_are_computed_again_as_they_were(random_llama: Any) -> None:
    """The first pass, in which layers do not know yet with whom they share, and the next ones."""
    losses = []
    for checkpointing in (False, True):
        model: Any = AutoModelForCausalLM.from_pretrained(random_llama)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3
        )
        model = get_peft_model(model, config)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        ids = torch.arange(3, 21).view(2, 9)
        with cast_once(model):
            for _ in range(3):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
    assert losses[3:] == losses[:3]
    assert losses[2] < losses[0]


class Square(nn.Module):
    """Named like the norms of models, and another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(24)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square() * self.weight


def test_norms_are_the_models_own_with_their_gradients() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    torch.manual_seed(0)
    other = type("OtherRMSNorm", (Square,), {})()
    model = nn.ModuleList(
        [LlamaRMSNorm(24, 1e-3), GemmaRMSNorm(24, 1e-3), other, nn.LayerNorm(24)]
    )
    model.requires_grad_(False)
    for norm in model:
        norm.weight.uniform_(-1, 1)
    x = torch.randn(2, 5, 24)
    # One that takes a gate beside its input is left to itself.
    gated = type("GatedRMSNorm", (Qwen3NextRMSNormGated,), {})(24)
    with cast_once(gated), torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated(x, gate=x).shape == x.shape

    def run(norm: nn.Module) -> list[torch.Tensor]:
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(own)
        return [y, *torch.autograd.grad(y.square().sum(), own)]

    plain = [run(norm) for norm in model]
    with cast_once(model):
        replaced = ["forward" in norm.__dict__ for norm in model]
        found = [run(norm) for norm in model]
        # One that is trained is left to itself, and so are runs in float32.
        model[0].requires_grad_(True)
        trained = run(model[0])
        exact = model[1](x)
    assert replaced == [True, True, False, False]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(trained[0], plain[0][0]) and torch.equal(exact, model[1](x))
    assert not any("forward" in norm.__dict__ for norm in model)


def test_weights_that_change_are_cast_again() -> None:
    model, x = adapted(), torch.randn(5, 24)
    layer = model.get_base_model().k.base_layer
    with cast_once(model), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        layer.weight.data = layer.weight.data * 2
        assert torch.equal(layer(x), 4 * before)


def test_an_input_without_a_graph_is_not_taken_for_one_with() -> None:
    model = adapted()
    x = torch.randn(5, 24).requires_grad_()
    with cast_once(model), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(x)
        model(x).float().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_scores_of_few_logits_are_those_of_all() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, 45, 60)).requires_grad_()
    labels = torch.randint(60, (1, 45))
    labels[0, ::5] = -100
    found = heads._scored(logits, labels, None)
    learnt = labels != -100
    scores = logits[learnt].log_softmax(-1)
    expected = scores.gather(-1, labels[learnt][:, None])[:, 0]
    torch.testing.assert_close(found.log_probs[learnt], expected)
    torch.testing.assert_close(found.entropy[learnt], -(scores.exp() * scores).sum(-1))
    assert torch.equal(found.is_top1[learnt], scores.argmax(-1) == labels[learnt])
    assert found.log_probs[~learnt].abs().sum() == 0
    weights = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((found.log_probs[learnt] * weights).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("short", [0, 256])
@pytest.mark.parametrize("window", [None, 2])
def test_rows_side_by_side_attend_as_each_alone(
    monkeypatch: pytest.MonkeyPatch, short: int, window: int | None
) -> None:
    monkeypatch.setattr(attention, "_SHORT", short)
    torch.manual_seed(0)
    lengths, heads_, width = [4, 9, 5, 8, 1], 4, 8
    tokens = sum(lengths)
    rows = attention.Rows.of(lengths, torch.device("cpu"))
    assert [group.places.shape for group in rows.groups] == [(2, 9), (2, 5), (1, 1)]
    number = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    apart = place[:, None] - place[None]
    mask = (number[:, None] == number[None]) & (apart >= 0)
    if window is not None:
        mask &= apart < window
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    q = torch.randn(1, heads_, tokens, width, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, heads_ // 2, tokens, width, dtype=torch.bfloat16)
    whole = mask[None, None]
    found, _ = attention._attention(module, q, k, v, whole, row_blocks=rows, scaling=0.3)
    score = torch.einsum("hqd,hkd->hqk", q[0].float(), k[0].float().repeat_interleave(2, 0))
    weights = (0.3 * score).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,hkd->qhd", weights, v[0].float().repeat_interleave(2, 0))
    torch.testing.assert_close(found[0].float(), expected, rtol=0.03, atol=0.03)


def test_a_model_learns_the_same_in_mixed_precision(
    random_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end to end and products that cast once, against each row alone and PEFT's layers."""
    from optuna_lora_rl.finetuning.model_call import ModelCall
    from optuna_lora_rl.finetuning.model_call import learnt_only

    model: Any = AutoModelForCausalLM.from_pretrained(random_llama, attn_implementation="sdpa")
    attention.use_blocks(model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    rows = [[5, 6, 7, 8, 2], [9, 2], [11, 12, 13]]
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(logits: torch.Tensor) -> torch.Tensor:
        following = torch.tensor([token for row in rows for token in row[1:]])
        loss = nn.functional.cross_entropy(logits.float(), following)
        found = torch.autograd.grad(loss, trained)
        return torch.cat([gradient.flatten() for gradient in found])

    alone = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows])
    expected = gradients(alone)
    multiplied: list[torch.dtype] = []
    own = attention._multiplied_out

    def counted(module: nn.Module, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        multiplied.append(q.dtype)
        return own(module, q, *args, **kwargs)

    monkeypatch.setattr(attention, "_multiplied_out", counted)
    call = ModelCall(end_to_end=True, always=True)
    # As in training: autocast is on in the model alone.
    with cast_once(model), learnt_only(model, inputs, call) as selected:
        selected.pop("shift_labels")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**selected).logits[0]
        found = gradients(logits)
    groups, layers = 3, model.config.num_hidden_layers
    assert multiplied == groups * layers * [torch.bfloat16]
    apart = (found - expected).norm() / expected.norm()
    assert apart < 0.02, apart
