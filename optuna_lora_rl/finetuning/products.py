"""Products with frozen weights under autocast, without work that is done again and again.

Autocast casts the weight and the input of every product anew. The weight of a frozen layer is the
same in each; queries, keys and values have one input. Here a weight is cast once for a run, and an
input once for all layers that read it. PEFT's LoRA layer casts its input to float32 and back, and
scales and adds its update in steps of their own. Here the layers that read one input are one step:
on the way there one product has the A of all their adapters, on the way back one sum takes in what
all of them send to the input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from typing import TypeAlias

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch import nn
from torch.autograd.function import once_differentiable

from optuna_lora_rl.finetuning.norms import RootMeanSquare

_Layer: TypeAlias = nn.Linear | LoraLinear


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Has the linear layers of a model compute so, for as long as their weights stay.

    Without autocast, and for layers that are not plain ones (quantised, DoRA, an adapter switched
    off), all is as it was.

    Args:
        model: With an adapter or without.
    """
    changed: list[nn.Module] = []
    products = _Products()
    try:
        for module in model.modules():
            if "forward" in module.__dict__:
                continue
            if type(module) in {LoraLinear, nn.Linear}:
                module.__dict__["forward"] = partial(products.of, module, module.forward)
            elif norm := RootMeanSquare.of(module):
                module.__dict__["forward"] = norm
            else:
                continue
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


class _Products:
    """What the layers of a model make of their inputs.

    Which layers read one input shows in the first pass. From then on the first of them computes
    for all, and the others fetch what is theirs.
    """

    def __init__(self) -> None:
        self._weights: dict[nn.Linear, _Weights] = {}
        # By the first of them, the layers that were called one after the other with one input.
        self._following: dict[_Layer, list[_Layer]] = {}
        # A weak reference, so that what led to the input is not kept, with all its memory.
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: tuple[object, ...] = ()
        self._called: list[_Layer] = []
        self._made: dict[_Layer, Tensor] = {}

    def of(self, layer: _Layer, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what a layer makes of x (..., inputs): here where it is plain, else itself."""
        dtype = _autocast(x)
        if dtype is None or args or kwargs or not self._is_plain(layer, dtype):
            y: Tensor = own(x, *args, **kwargs)
            return y
        state = (x._version, dtype, torch.is_grad_enabled())
        if self._input() is not x or state != self._state:
            self._input, self._state, self._called, self._made = weakref.ref(x), state, [], {}
        if layer not in self._made:
            self._compute(layer, x, dtype)
        if layer not in self._called:
            self._called.append(layer)
            known = self._following.setdefault(self._called[0], [])
            known += [layer] * (layer not in known)
        return self._made.pop(layer)

    def _compute(self, layer: _Layer, x: Tensor, dtype: torch.dtype) -> None:
        layers = [layer]
        if not _drops(layer):
            others = (other for other in self._following.get(layer, ()) if other is not layer)
            layers += [o for o in others if self._is_plain(o, dtype) and not _drops(o)]
        weights = [self._cast(other, dtype) for other in layers]
        x = x.to(dtype)
        if len(layers) == 1 and isinstance(layer, nn.Linear):
            self._made[layer] = nn.functional.linear(x, *weights[0])
            return
        kept = x
        if isinstance(layer, LoraLinear) and _drops(layer):
            # In float32, as PEFT does it: in another type the random numbers are others.
            kept = layer.lora_dropout[_name(layer)](x.float()).to(dtype)
        adapters = [other for other in layers if isinstance(other, LoraLinear)]
        scales = [
            other.scaling[_name(other)] if isinstance(other, LoraLinear) else None
            for other in layers
        ]
        factors = [other.lora_A[_name(other)].weight for other in adapters]
        factors += [other.lora_B[_name(other)].weight for other in adapters]
        made = _Product.apply(x, kept, weights, scales, *factors)
        self._made.update(zip(layers, made, strict=True))

    def _cast(self, layer: _Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        if base not in self._weights:
            self._weights[base] = _Weights(base)
        return self._weights[base].of(dtype)

    def _is_plain(self, layer: _Layer, dtype: torch.dtype) -> bool:
        if isinstance(layer, nn.Linear):
            return layer.weight.dtype != dtype and _is_frozen(layer)
        names = layer.active_adapters
        return (
            len(names) == 1
            and names[0] in layer.lora_A
            and names[0] not in layer.lora_variant
            and layer.lora_B[names[0]].bias is None
            and not layer.disable_adapters
            and not layer.merged
            and type(layer.base_layer) is nn.Linear
            and _is_frozen(layer.base_layer)
        )


class _Weights:
    """A linear layer's weight and bias in autocast's type, which are cast when first asked for."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._cast: tuple[object, Tensor, Tensor | None] | None = None

    def of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._layer.weight, self._layer.bias
        state = (dtype, weight.data_ptr(), weight._version)
        if self._cast is None or self._cast[0] != state:
            whole = None if bias is None else bias.detach().to(dtype)
            self._cast = (state, weight.detach().to(dtype), whole)
        return self._cast[1:]


class _Product(torch.autograd.Function):
    """x W^T + b + s k A^T B^T for each of the layers that read x.

    Shapes: x and k (..., inputs), k being x or what dropout keeps of it; of each layer W (outputs,
    inputs), b (outputs,), and where it has an adapter A (r, inputs), B (outputs, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        weights: Sequence[tuple[Tensor, Tensor | None]],
        scales: Sequence[float | None],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(factors) // 2
        a = torch.cat(factors[:count]).to(x.dtype) if count else x.new_empty(0, x.shape[-1])
        b = [factor.to(x.dtype) for factor in factors[count:]]
        ranks = [factor.shape[1] for factor in b]
        h = kept.reshape(-1, kept.shape[-1]) @ a.mT
        made, parts = [], iter(zip(h.split(ranks, dim=1), b, strict=True))
        for (weight, bias), scale in zip(weights, scales, strict=True):
            y = nn.functional.linear(x, weight, bias)
            if scale is not None:
                part, own = next(parts)
                y.view(-1, y.shape[-1]).addmm_(part, own.mT, alpha=scale)
            made.append(y)
        ctx.save_for_backward(x, kept, h, a, *b)
        ctx.weights, ctx.scales, ctx.ranks = [weight for weight, _ in weights], scales, ranks
        ctx.is_one, ctx.kept_in = kept is x, factors[0].dtype if factors else None
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, kept, h, a, *b = ctx.saved_tensors
        rows = kept.reshape(-1, kept.shape[-1])
        gx: Tensor | None = None
        gh = torch.zeros_like(h)
        gb: list[Tensor | None] = []
        for gradient, weight in zip(gradients, ctx.weights, strict=True):
            if gradient is None or not ctx.needs_input_grad[0]:
                continue
            g = gradient.reshape(-1, gradient.shape[-1])
            gx = g @ weight if gx is None else gx.addmm_(g, weight)
        adapted = [i for i, scale in enumerate(ctx.scales) if scale is not None]
        parts = zip(adapted, h.split(ctx.ranks, dim=1), gh.split(ctx.ranks, dim=1), b, strict=True)
        for i, own, to, factor in parts:
            gradient, scale = gradients[i], ctx.scales[i]
            if gradient is None:
                gb.append(None)
                continue
            g = gradient.reshape(-1, gradient.shape[-1])
            to.copy_(g @ factor).mul_(scale)
            gb.append((g.mT @ own).to(ctx.kept_in).mul_(scale))
        ga = (gh.mT @ rows).to(ctx.kept_in).split(ctx.ranks) if adapted else ()
        gk: Tensor | None = None
        if ctx.needs_input_grad[1] and not ctx.is_one:
            gk = (gh @ a).view(kept.shape)
        elif gx is not None and adapted:
            gx.addmm_(gh, a)
        return None if gx is None else gx.view(x.shape), gk, None, None, *ga, *gb


def _is_frozen(layer: nn.Linear) -> bool:
    bias = layer.bias
    return not layer.weight.requires_grad and (bias is None or not bias.requires_grad)


def _name(layer: LoraLinear) -> str:
    name: str = layer.active_adapters[0]
    return name


def _drops(layer: _Layer) -> bool:
    if isinstance(layer, nn.Linear):
        return False
    return layer.training and not isinstance(layer.lora_dropout[_name(layer)], nn.Identity)


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
