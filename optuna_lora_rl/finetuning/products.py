"""Products with frozen weights under autocast, without work that is done again and again.

Autocast casts the weight and the input of every product anew. The weight of a frozen layer is the
same in each; queries, keys and values have one input. Here a weight is cast once for a run, and an
input once for all layers that read it. PEFT's LoRA layer casts its input to float32 and back,
and scales and adds its update in steps of their own; here the product of B adds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch import nn
from torch.autograd.function import once_differentiable


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Has the linear layers of a model compute so, for as long as their weights stay.

    Without autocast, and for layers that are not plain ones (quantised, DoRA, an adapter switched
    off), all is as it was.

    Args:
        model: With an adapter or without.
    """
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if "forward" in module.__dict__:
                continue
            if type(module) is LoraLinear:
                module.__dict__["forward"] = partial(_adapted, module, module.forward)
            elif type(module) is nn.Linear:
                module.__dict__["forward"] = partial(_frozen, _Weights(module), module.forward)
            else:
                continue
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


class _Weights:
    """A linear layer's weight and bias in autocast's type, which are cast when first asked for."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._cast: tuple[object, Tensor, Tensor | None] | None = None

    def of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.layer.weight, self.layer.bias
        state = (dtype, weight.data_ptr(), weight._version)
        if self._cast is None or self._cast[0] != state:
            whole = None if bias is None else bias.detach().to(dtype)
            self._cast = (state, weight.detach().to(dtype), whole)
        return self._cast[1:]

    @property
    def are_frozen(self) -> bool:
        return not any(weight.requires_grad for weight in self.layer.parameters())


def _frozen(weights: _Weights, own: Any, x: Tensor) -> Tensor:
    dtype = _autocast(x)
    if dtype is None or weights.layer.weight.dtype == dtype or not weights.are_frozen:
        return own(x)
    return nn.functional.linear(_cast(x, dtype), *weights.of(dtype))


def _adapted(layer: LoraLinear, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype, names = _autocast(x), layer.active_adapters
    if dtype is None or args or kwargs or not _is_plain(layer, names):
        return own(x, *args, **kwargs)
    x = _cast(x, dtype)
    y = layer.base_layer(x)
    (name,) = names
    # Dropped out in float32, as PEFT does it: in another type the random numbers are others.
    kept = layer.lora_dropout[name](x.float()).to(dtype) if _drops(layer, name) else x
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Add.apply(y, kept, a, b, layer.scaling[name])


class _Add(torch.autograd.Function):
    """y + s x A^T B^T, written into y.

    Shapes: y (..., outputs), x (..., inputs), A (r, inputs), B (outputs, r).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.kept_in = a.dtype
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        h = rows @ a.mT
        y.view(-1, y.shape[-1]).addmm_(h, b.mT, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        g2, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        gh = (g2 @ b).mul_(ctx.scale)
        gx = (gh @ a).view(x.shape) if needs_x else None
        ga = (gh.mT @ rows).to(ctx.kept_in) if needs_a else None
        gb = (g2.mT @ h).to(ctx.kept_in).mul_(ctx.scale) if needs_b else None
        return g, gx, ga, gb, None


def _is_plain(layer: LoraLinear, names: list[str]) -> bool:
    return (
        len(names) == 1
        and names[0] in layer.lora_A
        and names[0] not in layer.lora_variant
        and layer.lora_B[names[0]].bias is None
        and not layer.disable_adapters
        and not layer.merged
    )


def _drops(layer: LoraLinear, name: str) -> bool:
    return layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in another type, the same tensor to all that ask while x is what it is."""
    if x.dtype == dtype:
        return x
    state = (dtype, x._version, torch.is_grad_enabled())
    known: tuple[object, Tensor] | None = x.__dict__.get("_cast")
    if known is None or known[0] != state:
        known = (state, x.to(dtype))
        x.__dict__["_cast"] = known
    return known[1]
