"""The linear modules of a causal language model: where each sits and what it does.

Roles are read off the names that architectures give their modules, so that "query and value"
or "the MLP" mean the same for Llama, GPT-2, GPT-NeoX, OPT, Phi, BERT and others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Literal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig
    from transformers import PreTrainedModel

Role = Literal["query", "key", "value", "fused", "attention-output", "mlp-in", "mlp-out", "other"]

_QUERY = {"q_proj", "query", "q", "wq", "q_lin", "query_proj", "q_a_proj", "q_b_proj"}
_KEY = {"k_proj", "key", "k", "wk", "k_lin", "key_proj", "kv_a_proj_with_mqa"}
_VALUE = {"v_proj", "value", "v", "wv", "v_lin", "value_proj", "kv_b_proj"}
_FUSED = {"c_attn", "q_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "in_proj"}
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|expert|intermediate|^(fc\d?|fc_in|fc_out|lin\d|w[123]|wi|wi_\d"
    r"|gate_proj|up_proj|down_proj|gate_up_proj|dense_h_to_4h|dense_4h_to_h)$"
)
_PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")
_ATTENTION = re.compile(r"att")
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
        linears: All linear modules but the output head, in the order of the model.
        module_names: Paths of all modules.
        layers: Number of blocks.
        hidden: Width of the residual stream.
        vocabulary: Rows of the output head.
        parameters: Number of base parameters.
        fan_in_fan_out: Whether the weights are stored transposed (GPT-2's Conv1D).
        bias_parameters: Number of parameters in biases, those of norms and head included.
        attention_width: Features that attention mixes: heads times their size.
        parallel: Whether attention and MLP of a block read the same input (GPT-J, GPT-NeoX, Phi).
    """

    model_type: str
    linears: tuple[LinearModule, ...]
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
    """Reads the architecture off a loaded model."""
    from transformers.pytorch_utils import Conv1D

    linears = tuple(_linears(model))
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    blocks = [linear.layer for linear in linears if linear.layer is not None]
    return Architecture(
        model_type=model.config.model_type,
        linears=linears,
        module_names=tuple(name for name, _ in model.named_modules() if name),
        layers=1 + max(blocks, default=-1),
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0] if head is not None else config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias_parameters=sum(
            parameter.numel() for name, parameter in model.named_parameters() if "bias" in name
        ),
        attention_width=max(
            (linear.inputs for linear in linears if linear.role == "attention-output"),
            default=config.hidden_size,
        ),
        parallel=_is_parallel(config),
    )


def layer_of(name: str) -> int | None:
    """Returns the index of the block that a module or parameter path lies in."""
    match = _LAYER.match(name)
    return int(match["index"]) if match else None


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
    # A router chooses experts; it is small, and adapting it alone would be no MLP adapter.
    if layer_of(name) is None or leaf in ("router", "gate", "classifier"):
        return "other"
    if not any(_ATTENTION.search(part) for part in path):
        if any(_MLP.search(part) for part in (*path, leaf)) or leaf == "dense":
            return "mlp-in" if outputs > inputs else "mlp-out"
        return "other"
    if leaf in _QUERY:
        return "query"
    if leaf in _KEY:
        return "key"
    if leaf in _VALUE:
        return "value"
    return "fused" if leaf in _FUSED else "attention-output"
