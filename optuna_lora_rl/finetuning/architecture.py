"""The linear modules of a causal language model: where each sits and what it does.

Roles are read off the names that architectures give their modules, so that "query and value"
or "the MLP" mean the same for Llama, GPT-2, GPT-NeoX, OPT, Phi, BERT and others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Literal

from optuna_lora_rl.finetuning.reached import reached

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig
    from transformers import PreTrainedModel

Role = Literal["query", "key", "value", "fused", "attention-output", "mlp-in", "mlp-out", "other"]

_QUERY = {"q_proj", "query", "q", "wq", "q_lin", "query_proj", "project_q", "q_a_proj", "q_b_proj"}
_KEY = {"k_proj", "key", "k", "wk", "k_lin", "key_proj", "project_k", "kv_a_proj_with_mqa"}
_VALUE = {"v_proj", "value", "v", "wv", "v_lin", "value_proj", "project_v", "kv_b_proj", "kv_proj"}
_FUSED = {"c_attn", "q_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "in_proj"}
_FUSED |= {"in_proj_qkv", "in_proj_qkvz"}
_ROUTERS = {"router", "gate", "classifier", "shared_expert_gate"}
# A module round one matrix is called after what it does, the matrix after what it is.
_BARE = {"linear", "layer"}
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|expert|intermediate|^(ff|fc\d?|fc_in|fc_out|lin\d|w[123]|wi|wi_\d"
    r"|gate_proj|up_proj|down_proj|gate_up_proj|dense_h_to_4h|dense_4h_to_h)$"
)
_PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")
_ATTENTION = re.compile(r"att")
# What mixes tokens in attention's place: state spaces, gated recurrence, short convolutions.
_MIXER = re.compile(r"mixer|mamba|temporal_block|lstm|conv")
# As PEFT finds the layer of a module: the first number in its path.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class LinearModule:
    """One linear module.

    Attributes:
        name: Its path in the model.
        layer: Index of the block that holds it, or None outside the blocks.
        role: What it does there.
        inputs: Input features.
        outputs: Output features.
        bias: Whether it has a bias.
    """

    name: str
    layer: int | None
    role: Role
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Architecture:
    """What of a model the choice of targets and the count of costs need.

    Attributes:
        model_type: Its transformers name, such as ``"llama"``.
        linears: The linear modules that can be adapted, in the order of the model: those that a
            text passes through and PEFT adapts; not the output head.
        computing: All that a text passes through, adapted or not.
        left_out: The other linear modules, and experts that are one tensor, which no linear
            module is: nothing here adapts them. By name, those of all layers and experts
            under one.
        module_names: Paths of all modules.
        layers: Number of blocks.
        hidden: Width of the residual stream.
        vocabulary: Rows of the output head.
        parameters: Number of base parameters.
        fan_in_fan_out: Whether the weights are stored transposed (GPT-2's Conv1D).
        bias_parameters: Number of parameters in biases that a text passes through, those of norms
            and head included.
        attention_width: Features that attention mixes: heads times their size; 0 without it.
        parallel: Whether attention and MLP of a block read the same input (GPT-J, GPT-NeoX, Phi).
    """

    model_type: str
    linears: tuple[LinearModule, ...]
    computing: tuple[LinearModule, ...]
    left_out: tuple[str, ...]
    module_names: tuple[str, ...]
    layers: int
    hidden: int
    vocabulary: int
    parameters: int
    fan_in_fan_out: bool
    bias_parameters: int
    attention_width: int
    parallel: bool


def read(model: PreTrainedModel) -> Architecture:
    """Reads the architecture off a loaded model.

    Raises:
        UserError: When transformers' own model fails.
    """
    from transformers.pytorch_utils import Conv1D

    found = tuple(_linears(model))
    alive = reached(model, {linear.name: (linear.inputs, linear.outputs) for linear in found})
    computing = tuple(linear for linear in found if linear.name in alive)
    own = alive - _refused(model, found)
    linears = tuple(linear for linear in computing if linear.name in own)
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    blocks = [linear.layer for linear in linears if linear.layer is not None]
    return Architecture(
        model_type=model.config.model_type,
        linears=linears,
        computing=computing,
        left_out=(*_unreached(model, found, own), *_fused_experts(model)),
        module_names=tuple(name for name, _ in model.named_modules() if name),
        layers=1 + max(blocks, default=-1),
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0] if head is not None else config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias_parameters=sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if "bias" in name and name.rpartition(".")[0] in alive
        ),
        attention_width=max(
            (m.inputs for m in computing if m.role == "attention-output" and _attends(m.name)),
            default=config.hidden_size if any(_attends(m.name) for m in computing) else 0,
        ),
        parallel=_is_parallel(config),
    )


def layer_of(name: str) -> int | None:
    """Returns the index of the block that a module or parameter path lies in."""
    match = _LAYER.match(name)
    return int(match["index"]) if match else None


def _unreached(
    model: PreTrainedModel, found: Sequence[LinearModule], alive: frozenset[str]
) -> list[str]:
    """Names what no text passes through: the largest modules that hold nothing else."""
    rests = {""}
    for name in alive:
        rests.update(name[: match.start()] for match in re.finditer(r"\.", name))
    rests |= alive
    names = []
    for linear in found:
        if linear.name not in alive:
            parts = linear.name.split(".")
            ends = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            names.append(next((end for end in ends if end not in rests), linear.name))
    return list(dict.fromkeys(_of_all_layers(name) for name in names))


def _refused(model: PreTrainedModel, linears: Sequence[LinearModule]) -> set[str]:
    """Names what PEFT does not adapt as a linear module, or does not load again.

    Kernels of state-space models read the weights of some. Of mixtures of experts it takes names
    that were those of experts once for the tensors in which the experts lie today, although
    shared experts and dense layers still bear these names. And where transformers renames a
    checkpoint's weights it renames those of a saved adapter, whose names are the new ones.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_refused(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            _check_lora_target_modules_mamba(config, model, leaf)
            convert_peft_config_for_transformers(config, model, conversions=None)
        except ValueError:
            return True
        return leaf not in config.target_modules

    leaves = {linear.name.rpartition(".")[2] for linear in linears}
    refused = {leaf for leaf in leaves if is_refused(leaf)}
    saved = {f"base_model.model.{m.name}.lora_A.weight": torch.zeros(1, 1) for m in linears}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(saved))
    return {
        linear.name
        for linear, key in zip(linears, saved, strict=True)
        if linear.name.rpartition(".")[2] in refused or key not in loaded
    }


def _fused_experts(model: PreTrainedModel) -> list[str]:
    # (experts, outputs, inputs) or transposed.
    names = [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    return list(dict.fromkeys(_of_all_layers(name) for name in names))


def _of_all_layers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _attends(name: str) -> bool:
    return _ATTENTION.search(name.lower()) is not None


def _is_parallel(config: PretrainedConfig) -> bool:
    said = getattr(config, "use_parallel_residual", getattr(config, "parallel_attn", None))
    return config.model_type in _PARALLEL if said is None else bool(said)


def _linears(model: PreTrainedModel) -> Iterator[LinearModule]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            continue
        inputs, outputs = _features(module)
        yield LinearModule(
            name=name,
            layer=layer_of(name),
            role=_role(name, inputs, outputs),
            inputs=inputs,
            outputs=outputs,
            bias=module.bias is not None,
        )


def _features(module: nn.Module) -> tuple[int, int]:
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape  # type: ignore[misc]
    return int(inputs), int(outputs)


def _role(name: str, inputs: int, outputs: int) -> Role:
    *path, leaf = name.lower().split(".")
    if leaf in _BARE and path:
        *path, leaf = path
    # A router chooses experts; it is small, and adapting it alone would be no MLP adapter.
    if layer_of(name) is None or leaf in _ROUTERS:
        return "other"
    attends = any(_ATTENTION.search(part) for part in path)
    if not attends:
        if any(_MLP.search(part) for part in (*path, leaf)) or leaf == "dense":
            return "mlp-in" if outputs > inputs else "mlp-out"
        if not any(_MIXER.search(part) for part in path):
            return "other"
    if leaf in _QUERY:
        return "query"
    if leaf in _KEY:
        return "key"
    if leaf in _VALUE:
        return "value"
    mixes = not attends and "out" not in leaf and leaf != "o_proj"
    return "fused" if leaf in _FUSED or mixes else "attention-output"
