"""Products with frozen weights under autocast, without work that is done again and again.

Autocast casts the weight and the input of every product anew. The weight of a frozen layer is the
same in each; queries, keys and values have one input. Here a weight is cast once for a run, and an
input once for all layers that read it. PEFT's LoRA layer casts its input to float32 and back, and
scales and adds its update in steps of their own. Here the layers that read one input are one step:
on the way there one product has the A of all their adapters, on the way back one sum takes in what
all of them send to the input. Norms and positions, whose parts are many, are computed with less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
            elif type(module).__name__.endswith("RotaryEmbedding"):
                module.__dict__["forward"] = partial(_turns, module.forward)
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
        # By the first of them, the layers that were called one after the other with one input;
        # and those for which the first computed when it was last called.
        self._following: dict[_Layer, list[_Layer]] = {}
        self._together: dict[_Layer, list[_Layer]] = {}
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
        # In a backward pass checkpointing computes again, and has to meet what it met before.
        if torch._C._current_graph_task_id() == -1:
            self._together[layer] = list(self._following.get(layer, ()))
        others = (other for other in self._together[layer] if other is not layer)
        layers = [layer, *(other for other in others if self._is_plain(other, dtype))]
        weights = [self._cast(other, dtype) for other in layers]
        x = x.to(dtype)
        if len(layers) == 1 and isinstance(layer, nn.Linear):
            self._made[layer] = nn.functional.linear(x, *weights[0])
            return
        adapters = [_Adapter.of(other) for other in layers]
        factors = [adapter.a for adapter in adapters if adapter]
        factors += [adapter.b for adapter in adapters if adapter]
        made = _Product.apply(x, weights, adapters, *factors)
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
            and isinstance(layer.lora_dropout[names[0]], (nn.Dropout, nn.Identity))
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


@dataclass(frozen=True)
class _Adapter:
    """The adapter of a layer: A (r, inputs), B (outputs, r), s, and the share it drops of x."""

    a: Tensor
    b: Tensor
    scale: float
    drops: float

    @classmethod
    def of(cls, layer: _Layer) -> _Adapter | None:
        if isinstance(layer, nn.Linear):
            return None
        (name,) = layer.active_adapters
        dropout: Any = layer.lora_dropout[name]
        drops = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        # What is left of the input is scaled up, here with the product.
        return cls(a, b, layer.scaling[name] / (1 - drops), drops)


class _Product(torch.autograd.Function):
    """x W^T + b + s k A^T B^T for each of the layers that read x.

    Shapes: x (..., inputs) and k, what its dropout leaves of x; of each layer W (outputs, inputs),
    b (outputs,), and where it has an adapter A (r, inputs), B (outputs, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[tuple[Tensor, Tensor | None]],
        adapters: Sequence[_Adapter | None],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(factors) // 2
        a = torch.cat(factors[:count]).to(x.dtype) if count else x.new_empty(0, x.shape[-1])
        b = [factor.to(x.dtype) for factor in factors[count:]]
        ranks = [factor.shape[1] for factor in b]
        rows = x.reshape(-1, x.shape[-1])
        own = [adapter for adapter in adapters if adapter]
        masks = [kept(rows, adapter.drops) if adapter.drops else None for adapter in own]
        if any(adapter.drops for adapter in own):
            parts = zip(masks, a.split(ranks), strict=True)
            h = torch.cat([_masked(rows, mask) @ part.mT for mask, part in parts], dim=1)
        else:
            h = rows @ a.mT
        made, each = [], iter(zip(h.split(ranks, dim=1), b, strict=True))
        for (weight, bias), adapter in zip(weights, adapters, strict=True):
            y = nn.functional.linear(x, weight, bias)
            if adapter:
                part, up = next(each)
                y.view(-1, y.shape[-1]).addmm_(part, up.mT, alpha=adapter.scale)
            made.append(y)
        ctx.save_for_backward(x, h, a, *b, *masks)
        ctx.weights, ctx.adapters = [weight for weight, _ in weights], adapters
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, h, a, *rest = ctx.saved_tensors
        b, masks = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        rows = x.reshape(-1, x.shape[-1])
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]
        gx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for g, weight in zip(flat, ctx.weights, strict=True):
                if g is not None:
                    gx = g @ weight if gx is None else gx.addmm_(g, weight)
        gh = torch.zeros_like(h)
        gb: list[Tensor | None] = []
        own = [(g, adapter) for g, adapter in zip(flat, ctx.adapters, strict=True) if adapter]
        parts = zip(own, b, h.split(ctx.ranks, dim=1), gh.split(ctx.ranks, dim=1), strict=True)
        for (g, adapter), up, part, to in parts:
            if g is None:
                gb.append(None)
                continue
            to.copy_(g @ up).mul_(adapter.scale)
            gb.append((g.mT @ part).to(adapter.b.dtype).mul_(adapter.scale))
        ga: list[Tensor] = []
        if all(mask is None for mask in masks):
            ga += (gh.mT @ rows).split(ctx.ranks)
            if gx is not None and own:
                gx.addmm_(gh, a)
        else:
            for mask, part, down in zip(
                masks, gh.split(ctx.ranks, dim=1), a.split(ctx.ranks), strict=True
            ):
                ga.append(part.mT @ _masked(rows, mask))
                if gx is not None:
                    gx.add_(_masked(part @ down, mask))
        found = (g.to(adapter.a.dtype) for g, (_, adapter) in zip(ga, own, strict=True))
        return None if gx is None else gx.view(x.shape), None, None, *found, *gb


def kept(x: Tensor, drops: float) -> Tensor:
    """Draws what dropout leaves of x: True with probability ``1 - drops``, to 16 bits.

    On a CPU torch's own dropout takes ten times as long as a product with a weight of the same
    width; here a number of 64 bits decides on four places.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - drops)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return numbers >= round(drops * 2**16) - 2**15


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    # 16 bits times 0 or 1, as whole numbers: torch would make numbers with a point of the mask.
    return x if mask is None else (x.view(torch.int16) * mask.view(torch.int8)).view(x.dtype)


def _is_frozen(layer: nn.Linear) -> bool:
    bias = layer.bias
    return not layer.weight.requires_grad and (bias is None or not bias.requires_grad)


def _turns(own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Has queries and keys turned by their positions in 16 bits, as in a model in 16 bits."""
    found, dtype = own(x, *args, **kwargs), _autocast(x)
    if dtype is None or x.device.type != "cpu" or not isinstance(found, tuple):
        return found
    return tuple(part.to(dtype) for part in found)


def is_mixed(x: Tensor) -> bool:
    """Whether layers that read x compute so."""
    return _autocast(x) is not None


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
