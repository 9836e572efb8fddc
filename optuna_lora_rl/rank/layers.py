"""The layers of a model by name: its linear modules, and the LoRA layers put in their place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# What PEFT puts before the names of the base model's modules.
PREFIX = "base_model.model."
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one layer, dW = scaling * B A.

    Attributes:
        a: A, shape (r, k).
        b: B, shape (d, r).
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)"""
        return self.b.shape[0], self.a.shape[1]

    @property
    def parameters(self) -> int:
        return self.a.numel() + self.b.numel()

    def kept(self) -> Factors:
        """Returns a copy on the CPU, which training does not change."""
        a, b = self.a.detach().cpu().clone(), self.b.detach().cpu().clone()
        return Factors(a=a, b=b, scaling=self.scaling)


def linear_modules(model: nn.Module, *, with_head: bool = False) -> dict[str, nn.Module]:
    """Returns the linear modules of the base model by name.

    Args:
        model: The model, with or without an adapter.
        with_head: Whether the output head is one of them.

    Raises:
        UserError: When there is none.
    """
    head = None if with_head else _head(model)
    found = {
        name: module
        for name, module in _base_modules(model, "")
        if _is_linear(module) and module is not head
    }
    if not found:
        raise UserError("the model has no linear layers besides its output head")
    return found


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Returns the linear LoRA layers of one adapter by the names of what they adapt.

    Experts that lie in one parameter are left out: their factors are many side by side.

    Raises:
        UserError: When there is none.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and adapter in module.lora_A
        and module.lora_A[adapter].weight.ndim == 2
    }
    if not found:
        raise UserError(f"the model has no linear LoRA layers of an adapter {adapter!r}")
    return found


def chosen(layers: Mapping[str, Any], names: Any) -> list[str]:
    """Returns ``names`` as a list, all of them if None.

    Raises:
        UserError: When one of them is no layer.
    """
    wanted = list(layers if names is None else names)
    for name in wanted:
        if name not in layers:
            raise UserError(
                f"there is no layer {name!r}; the layers are {', '.join(list(layers)[:3])}"
                f"{', ...' if len(layers) > 3 else ''}"
            )
    return wanted


def factors_of(layer: LoraLayer, adapter: str = "default") -> Factors:
    """Returns the factors of an attached LoRA layer; the tensors are the layer's own."""
    return Factors(
        a=layer.lora_A[adapter].weight.detach(),
        b=layer.lora_B[adapter].weight.detach(),
        scaling=float(layer.scaling[adapter]),
    )


def weight_of(module: nn.Module, name: str) -> Tensor:
    """Returns a linear module's weight as (d, k): outputs by inputs.

    Raises:
        UserError: When it is quantised, so that its numbers are no weights.
    """
    weight: Any = module.weight
    if not weight.is_floating_point():
        raise UserError(
            f"the weight of {name} is quantised ({str(weight.dtype).removeprefix('torch.')}); "
            "load the model in a floating point type"
        )
    return outputs_first(weight.detach(), module)


def outputs_first(tensor: Tensor, module: nn.Module) -> Tensor:
    """Returns a weight, or its gradient, as (d, k), also where the module stores it transposed."""
    return tensor.T if _is_transposed(module) else tensor


def shapes_of(model: nn.Module, *, with_head: bool = False) -> dict[str, tuple[int, int]]:
    """Returns (d, k) of each linear module; arguments as for :func:`linear_modules`."""
    shapes = {}
    for name, module in linear_modules(model, with_head=with_head).items():
        if _is_transposed(module):
            k, d = module.weight.shape  # type: ignore[misc]
        else:
            d, k = module.out_features, module.in_features
        shapes[name] = (int(d), int(k))
    return shapes


def others_of(model: nn.Module) -> dict[str, int]:
    """Returns the sizes of the matrices that are neither in a linear layer nor in an embedding.

    Such as experts that lie together in one parameter.
    """
    known = {id(module.weight) for module in linear_modules(model, with_head=True).values()}
    known |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in known
    }


def depths_of(names: Mapping[str, Any]) -> dict[str, float]:
    """Returns where each layer stands between the first block (0) and the last (1).

    Layers outside the blocks stand at 0.
    """
    blocks = {name: _BLOCK.search(name) for name in names}
    indices = {name: int(match[1]) if match else 0 for name, match in blocks.items()}
    last = max(indices.values(), default=0)
    return {name: index / last if last else 0.0 for name, index in indices.items()}


def exactly(name: str) -> str:
    """Returns the key of a ``rank_pattern`` that PEFT matches to this module and to no other.

    PEFT reads keys as regular expressions for the end of a path.
    """
    return "^" + re.escape(name)


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """Returns the factor by which BA counts."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float:
    """Returns the alpha that gives ``scaling`` at ``rank``, whole where it is a whole number."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, BaseTunerLayer):
            yield here.removeprefix(PREFIX), child.get_base_layer()
            continue
        yield here.removeprefix(PREFIX), child
        yield from _base_modules(child, here)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _head(model: nn.Module) -> nn.Module | None:
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
