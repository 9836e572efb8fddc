from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import architecture
from optuna_lora_rl.finetuning.targets import layer_indices
from optuna_lora_rl.finetuning.targets import peft_names
from optuna_lora_rl.finetuning.targets import select

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SMALL = {"vocab_size": 64}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
BERT = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "is_decoder": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "phi": {**LLAMA_LIKE, "num_key_value_heads": 2},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "gpt2": {**SMALL, "n_embd": 16, "n_layer": 4, "n_head": 2},
    "gptj": {**SMALL, "n_embd": 16, "n_layer": 4, "n_head": 2, "rotary_dim": 4},
    "gpt_neox": {
        **SMALL,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    },
    "opt": {
        **SMALL,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
    "bloom": {**SMALL, "hidden_size": 16, "n_layer": 4, "n_head": 2},
    "falcon": {**SMALL, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
    "mpt": {**SMALL, "d_model": 16, "n_layers": 4, "n_heads": 2},
    "bert": BERT,
}
QV = {
    "gpt2": {"attn.c_attn"},
    "gpt_neox": {"attention.query_key_value"},
    "bloom": {"self_attention.query_key_value"},
    "falcon": {"self_attention.query_key_value"},
    "mpt": {"attn.Wqkv"},
    "phi3": {"self_attn.qkv_proj"},
    "gptj": {"attn.q_proj", "attn.v_proj"},
    "bert": {"attention.self.query", "attention.self.value"},
}
MLP = {
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "bloom": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "mpt": {"ffn.up_proj", "ffn.down_proj"},
    "opt": {"fc1", "fc2"},
    "phi": {"mlp.fc1", "mlp.fc2"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "gptj": {"mlp.fc_in", "mlp.fc_out"},
    "bert": {"intermediate.dense", "output.dense"},
}
OUTPUT = {
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "mpt": "attn.out_proj",
    "opt": "self_attn.out_proj",
    "phi": "self_attn.dense",
    "gptj": "attn.out_proj",
    "bert": "attention.output.dense",
}


@cache
def model(name: str) -> Any:
    import torch
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name]))


def in_block(chosen: Any) -> set[str]:
    """Paths below the numbered block, the same for all blocks."""
    return {linear.name.split(f".{linear.layer}.", 1)[1] for linear in chosen}


@pytest.mark.parametrize("name", MODELS)
def test_presets_mean_the_same_in_every_architecture(name: str) -> None:
    read = architecture.read(model(name))
    assert read.layers == 4
    qv = in_block(select(read, "qv"))
    mlp = in_block(select(read, "mlp"))
    attention = in_block(select(read, "attention"))
    assert qv == QV.get(name, {"self_attn.q_proj", "self_attn.v_proj"})
    assert mlp == MLP.get(name, {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
    assert qv < attention
    assert attention >= {OUTPUT.get(name, "self_attn.o_proj")}
    assert not attention & mlp
    everything = select(read, "all-linear")
    assert in_block(linear for linear in everything if linear.layer is not None) == attention | mlp


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"phi"}))
def test_qv_is_what_peft_takes_by_default(name: str) -> None:
    # PEFT's default for Phi has the MLP too, which is no query and value.
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(name)
    if defaults is not None:
        leaves = {
            path.rsplit(".", 1)[-1]
            for path in in_block(select(architecture.read(model(name)), "qv"))
        }
        assert leaves == set(defaults)


@pytest.mark.parametrize("layers", ["all", "last-half", "1", "0,2-3"])
@pytest.mark.parametrize("target", ["qv", "attention", "mlp", "all-linear"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_adapts_exactly_what_was_chosen(name: str, target: str, layers: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    read = architecture.read(model(name))
    chosen = select(read, target, layers)
    names, indices = peft_names(read, chosen)
    config = LoraConfig(target_modules=names, layers_to_transform=indices)
    adapted = {name for name in read.module_names if check_target_module_exists(config, name)}
    assert adapted == {linear.name for linear in chosen}
    if name != "bert":
        assert len(names) <= 12, "names stand for a module in every layer"


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_pefts_all_linear(name: str) -> None:
    import copy

    from peft import LoraConfig
    from peft import get_peft_model

    fresh = copy.deepcopy(model(name))
    adapted = get_peft_model(fresh, LoraConfig(r=1, target_modules="all-linear"))
    theirs = {
        path.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for path, _ in adapted.named_modules()
        if path.endswith(".lora_A.default")
    }
    assert {linear.name for linear in architecture.read(model(name)).linears} == theirs


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 3, {0, 1, 2}),
        ("first-half", 4, {0, 1}),
        ("last-half", 4, {2, 3}),
        ("first-half", 5, {0, 1}),
        ("last-half", 5, {3, 4}),
        ("middle", 4, {1, 2}),
        ("first-half", 1, {0}),
        ("middle", 1, {0}),
        ("0,2-4", 6, {0, 2, 3, 4}),
    ],
)
def test_layers_mean_blocks(layers: str, count: int, expected: set[int]) -> None:
    assert layer_indices(layers, count) == expected


def test_unusual_names_fall_back_to_pefts_own_table() -> None:
    linears = tuple(
        architecture.LinearModule(f"model.layers.0.mixer.{name}", 0, "other", 8, 8, False)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj")
    )
    read = dataclasses.replace(
        architecture.read(model("llama")), model_type="nemotron_h", linears=linears
    )
    assert in_block(select(read, "qv")) == {
        f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    unknown = dataclasses.replace(read, model_type="unknown")
    with pytest.raises(UserError, match="names no linear module of this unknown model"):
        select(unknown, "qv")


def test_own_lists_mean_every_module_that_ends_so() -> None:
    read = architecture.read(model("llama"))
    sets = {"mine": ["o_proj", "mlp.up_proj"]}
    assert in_block(select(read, "mine", "all", sets)) == {"self_attn.o_proj", "mlp.up_proj"}
    assert {linear.layer for linear in select(read, "mine", "3", sets)} == {3}


@pytest.mark.parametrize(
    ("target", "layers", "words"),
    [
        ("everything", "all", "qv, attention, mlp, all-linear, wrong, typo, head"),
        ("wrong", "all", "no module 'dense'; there are down_proj, gate_proj"),
        ("typo", "all", "did you mean 'q_proj'?"),
        ("head", "all", "'lm_head' is no linear module that can be adapted"),
        ("qv", "3-1", "this model has the layers 0 to 3"),
        ("qv", "2-4", "this model has the layers 0 to 3"),
    ],
)
def test_what_the_model_has_not_is_named(target: str, layers: str, words: str) -> None:
    sets = {"wrong": ["dense"], "typo": ["q_porj"], "head": ["lm_head"]}
    with pytest.raises(UserError) as refused:
        select(architecture.read(model("llama")), target, layers, sets)
    assert words in str(refused.value)
