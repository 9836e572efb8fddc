"""Small models of several architectures, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Without dropout of their own.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "phi": {"hidden_size": 16, "intermediate_size": 32},
    "mistral": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
    "gpt2": {"hidden_size": 16, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


def saved_model(name: str, changes: dict[str, Any], tokenizer: Any, folder: Path) -> str:
    """Saves a two-layer model with its tokenizer, and returns its folder."""
    from transformers import AutoConfig

    tokenizer.save_pretrained(folder / name)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "eos")}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **sizes, **ids, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return str(folder / name)
