"""A tiny model with random weights of every architecture that AutoModelForCausalLM knows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from optuna_lora_rl import tiny

_WIDTH, _HEADS, _LAYERS = 32, 4, 2
_MOST_PARAMETERS = 60_000_000
_NOISE = 0.05
_SEED = 0


def _same(value: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, value)


# What architectures call their sizes.
_SIZES = {
    **_same(_WIDTH, "hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"),
    **_same(_WIDTH, "word_embed_proj_dim", "embed_dim", "hidden_dim", "mm_hidden_size"),
    **_same(_WIDTH, "lru_width", "d_embed", "output_hidden_size"),
    **_same(
        _WIDTH, "input_embedding_size", "output_embedding_size", "hidden_size_per_layer_input"
    ),
    **_same(_HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    **_same(_HEADS, "decoder_attention_heads", "encoder_attention_heads"),
    **_same(_HEADS, "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_same(2, "num_key_value_heads", "n_head_kv", "num_kv_heads", "num_global_key_value_heads"),
    **_same(_WIDTH // _HEADS, "head_dim", "attention_head_size", "kv_channels"),
    **_same(_WIDTH // _HEADS, "global_head_dim", "attention_head_dim", "qk_rope_head_dim"),
    **_same(_WIDTH // _HEADS, "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"),
    **_same(_WIDTH // _HEADS, "linear_value_head_dim", "swa_head_dim", "swa_v_head_dim"),
    **_same(16, "q_lora_rank", "kv_lora_rank", "o_lora_rank"),
    **_same(4, "rotary_dim"),
    **_same(8, "chunk_size", "mamba_chunk_size"),
    **_same(4 * _WIDTH // 2, "intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff"),
    **_same(2 * _WIDTH, "decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size"),
    **_same(
        2 * _WIDTH, "shared_expert_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"
    ),
    **_same(2 * _WIDTH, "intermediate_size_mlp", "dim_ff", "feed_forward_size", "prefix_dim"),
    **_same(_LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    **_same(_LAYERS, "encoder_layers", "num_encoder_layers", "num_decoder_layers"),
    **_same(_LAYERS, "decoder_layers"),
    **_same(128, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    **_same(128, "max_sequence_length", "context_length"),
    **_same(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_same(2, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    **_same(4, "zero_expert_num"),
    **_same(1, "num_group", "n_group", "topk_group"),
}
# What else a small model of an architecture needs, on top of its sizes.
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_HEAD = {"head_dim": _WIDTH // _HEADS, "num_key_value_heads": 2}
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "ministral": {**_HEAD, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": _HEAD,
    "qwen4_exp": {"text_config": _HEAD},
    "qwen4_exp_text": _HEAD,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


class NoTinyModel(Exception):
    """No configuration was found with which transformers makes a small model."""


def names() -> list[str]:
    """Names of all architectures, as a configuration's ``model_type`` gives them."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_of(name: str) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def save(name: str, folder: Path) -> None:
    """Writes a tiny model and the package's own tokenizer into a folder.

    Raises:
        NoTinyModel: When transformers makes none.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL_FOLDER)
    try:
        config = _small(CONFIG_MAPPING[name], tokenizer, _CHANGES.get(name, {}))
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count > _MOST_PARAMETERS:
            raise NoTinyModel(f"its smallest has {count / 1e6:.0f} million parameters")
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                # Also gates, caps and biases, which begin as if they were not there.
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * _NOISE)
                model.eval()(input_ids=torch.arange(5, 14)[None], use_cache=False)
        model.save_pretrained(folder)
    except NoTinyModel:
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        raise NoTinyModel(f"{type(error).__name__}: {first[0]}") from error
    tokenizer.save_pretrained(folder)


def _small(kind: type[PretrainedConfig], tokenizer: Any, changes: dict[str, Any]) -> Any:
    default = kind()
    known = set(default.to_dict()) | set(inspect.signature(kind.__init__).parameters)
    sizes: dict[str, Any] = {
        name: value
        for name, value in _SIZES.items()
        if name in known and isinstance(_value(default, name), int)
    }
    if "kv_lora_rank" in known:
        # Keys and values are unfolded for each head.
        sizes["num_key_value_heads"] = _HEADS
    for end in ("pad", "bos", "eos"):
        if f"{end}_token_id" in known:
            sizes[f"{end}_token_id"] = getattr(tokenizer, f"{end}_token_id")
    if "vocab_size" in known:
        sizes["vocab_size"] = len(tokenizer)
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    sizes.update(_shortened(default, known))
    for name, part in kind.sub_configs.items():
        if part is not AutoConfig or _value(default, name) is not None:
            own = type(_value(default, name)) if part is AutoConfig else part
            sizes[name] = _small(own, tokenizer, changes.get(name, {}))
    rest = {name: value for name, value in changes.items() if name not in kind.sub_configs}
    return kind(**{**sizes, **rest})


def _shortened(default: Any, known: set[str]) -> dict[str, Any]:
    """Cuts lists of one value a layer to the layers that there are, of as many kinds as fit."""
    cut: dict[str, Any] = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        kinds = _value(default, name) if name in known else None
        if isinstance(kinds, list | tuple) and kinds:
            different = list(dict.fromkeys(kinds))
            cut[name] = (different * _LAYERS)[:_LAYERS]
    return cut


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        # Some attributes are one a layer, and refuse to be asked for as one.
        return None
