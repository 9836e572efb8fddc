"""Small models with adapters whose factors are random, so that they have an effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def model(random_llama: Path) -> Any:
    """The random Llama, frozen."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_llama).requires_grad_(False).eval()


@pytest.fixture
def ids() -> Any:
    """Two sequences of tokens."""
    import torch

    return torch.arange(20).reshape(2, 10)


@pytest.fixture
def adapted(model: Any) -> Callable[..., Any]:
    """Attaches an adapter and fills its factors; keyword arguments are LoraConfig's."""
    return lambda **options: attach(model, **options)


def attach(model: Any, random: bool = True, **options: Any) -> Any:
    import torch
    from peft import LoraConfig
    from peft import get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**settings, **options}))
    if random:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return peft


def drawn_factors(d: int, k: int, r: int, seed: int) -> tuple[Any, Any]:
    """Random A, shape (r, k), and B, shape (d, r)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, k, generator=generator), torch.randn(d, r, generator=generator)


def language_loss(model: Any, ids: Any) -> Any:
    """The loss of predicting the tokens."""
    return model(input_ids=ids, labels=ids).loss
