from __future__ import annotations

import itertools
import random
import statistics
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.finetuning import cost
from optuna_lora_rl.finetuning.configuration import Configuration

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LENGTH = 48
SEQUENCES = 4
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"use_dora": True},
    {"init_lora_weights": "mica"},
    {"bias": "all"},
    {"bias": "lora_only"},
)


@cache
def model(name: str) -> Any:
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
        "llama": {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 2},
    }.get(name, {"hidden_size": 64, "intermediate_size": 256})
    if name != "gpt2":
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(name, vocab_size=300, **sizes)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return made.requires_grad_(False)


def counted_and_estimated(
    name: str, parameters: dict[str, Any], *, checkpointing: bool = False
) -> tuple[int, int, cost.Estimate]:
    """Runs one training step under torch's counter, and estimates it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from trl.trainer.utils import add_fused_lm_head

    from optuna_lora_rl.finetuning import architecture
    from optuna_lora_rl.finetuning import lora

    # torch's counter does not know the in-place product of TRL's chunked loss.
    mapping = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    base = model(name)
    read = architecture.read(base)
    configuration = Configuration.of(parameters)
    chosen = lora.targets_of(configuration, read, {})
    with lora.attached(base, lora.lora_config(configuration, read, chosen), chosen) as adapter:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        adapter.model.train()
        ids = torch.randint(0, 300, (SEQUENCES, LENGTH))
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            output = adapter.model(
                input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), fused_lm_head=True
            )
            output.log_probs.sum().backward()
        trainable = adapter.trainable_parameters
    work = cost.Work(1, SEQUENCES, SEQUENCES, LENGTH, checkpointing=checkpointing)
    return counter.get_total_flops(), trainable, cost.estimate(configuration, read, chosen, work)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("target", ["qv", "attention", "mlp", "all-linear"])
def test_estimate_agrees_with_torchs_counter(name: str, target: str) -> None:
    for layers, variant in itertools.product(("all", "last-half"), VARIANTS):
        parameters = {"target_modules": target, "layers": layers, **variant}
        flops, trainable, estimate = counted_and_estimated(name, parameters)
        assert estimate.flops == pytest.approx(flops, rel=0.02), parameters
        assert estimate.trainable_parameters == trainable, parameters


def test_what_no_adapter_reaches_is_computed_all_the_same() -> None:
    # PEFT adapts no out_proj here, and there is no attention whose cost grows with the square;
    # what the scan itself computes is not counted.
    flops, trainable, estimate = counted_and_estimated("mamba", {"target_modules": "all-linear"})
    assert 0.85 * flops < estimate.flops < flops
    assert estimate.trainable_parameters == trainable


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_checkpointing_is_counted_as_one_more_forward(name: str) -> None:
    # A little too high: torch stops recomputing once it has what the backward pass reads.
    for target in ("qv", "all-linear"):
        flops, _, estimate = counted_and_estimated(
            name, {"target_modules": target}, checkpointing=True
        )
        assert 0.99 * flops < estimate.flops < 1.1 * flops


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), size=st.integers(1, 40))
def test_padded_length_lies_between_mean_and_longest(lengths: list[int], size: int) -> None:
    expected = cost.expected_padded_length(lengths, size)
    assert statistics.mean(lengths) - 1e-6 <= expected <= max(lengths) + 1e-6
    if size == 1:
        assert expected == pytest.approx(statistics.mean(lengths))
    if size >= len(lengths):
        assert expected == pytest.approx(max(lengths))


def test_padded_length_is_what_random_batches_have() -> None:
    lengths = [3, 3, 5, 8, 9, 20]
    generator = random.Random(0)
    drawn = [max(generator.sample(lengths, 3)) for _ in range(20_000)]
    assert cost.expected_padded_length(lengths, 3) == pytest.approx(
        statistics.mean(drawn), rel=0.01
    )


def estimate(**parameters: Any) -> cost.Estimate:
    from optuna_lora_rl.finetuning import architecture
    from optuna_lora_rl.finetuning import lora

    read = architecture.read(model("llama"))
    work = cost.Work(
        steps=parameters.pop("steps", 10),
        sequences=8,
        micro_batch_size=parameters.pop("micro", 8),
        length=LENGTH,
        checkpointing=parameters.pop("checkpointing", False),
        itemsize=parameters.pop("itemsize", 4),
        weight_itemsize=parameters.pop("weight_itemsize", 4),
    )
    configuration = Configuration.of(parameters)
    chosen = lora.targets_of(configuration, read, {})
    return cost.estimate(configuration, read, chosen, work)


def test_more_costs_more() -> None:
    plain = estimate()
    assert estimate(steps=20).flops == 2 * plain.flops
    assert estimate(lora_rank=16).flops > plain.flops
    assert estimate(lora_rank=16).memory_bytes > plain.memory_bytes
    assert estimate(lora_rank=16).trainable_parameters == 2 * plain.trainable_parameters
    assert estimate(target_modules="qv").flops < plain.flops
    assert estimate(layers="last-half").flops < estimate(layers="first-half").flops
    assert estimate(layers="last-half").memory_bytes < estimate(layers="first-half").memory_bytes
    assert estimate(use_dora=True).flops > plain.flops


def test_memory_is_saved_where_it_should_be() -> None:
    plain = estimate()
    assert estimate(micro=2).memory_bytes < plain.memory_bytes
    assert estimate(micro=2).flops == plain.flops
    assert estimate(checkpointing=True).memory_bytes < plain.memory_bytes
    assert estimate(checkpointing=True).flops > plain.flops
    assert estimate(itemsize=2).memory_bytes < plain.memory_bytes
    halved = plain.memory_bytes - estimate(weight_itemsize=2).memory_bytes
    assert halved == 2 * sum(parameter.numel() for parameter in model("llama").parameters())
    assert estimate(optim="sgd").memory_bytes < plain.memory_bytes
    assert estimate(optim="adamw_bnb_8bit").memory_bytes < plain.memory_bytes
