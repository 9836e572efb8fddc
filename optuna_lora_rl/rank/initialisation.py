"""How the factors of an adapter begin, beside what PEFT has.

============== =======================================================================
xavier         uniform, variance 2 / (fan in + fan out) (Glorot & Bengio 2010)
kaiming        normal, variance 2 / fan in (He et al. 2015, arXiv 1502.01852)
orthogonal     orthonormal rows, of any rank (Saxe et al. 2013, arXiv 1312.6120)
svd            the leading singular directions of a target, by default the weight
layer-adaptive PEFT's start, smaller with depth: times 1 - decay * depth
weight-adaptive normal, to the weight's own statistics: its standard deviation times
               the effective share of its directions, but with no larger spectral
               norm than the weight's
============== =======================================================================

As a rule only A begins so and B with zeros, and the adapter has no effect at the start. With
``both`` B begins likewise (of ``svd``: B A is the best approximation of the target). Training then
starts from the base model all the same, because the frozen weight is made W - s B0 A0, as PiSSA
does it (Meng et al. 2024, arXiv 2404.02948). The adapter is saved as the plain one of rank r + r0
that makes the same update, BA - B0 A0 = [B | -B0] [A ; A0], and loads on the base as it was. In
half precision the made weight is rounded, so that the start is as exact as the weight's type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import Literal
from typing import get_args

import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.layers import Factors

Kind = Literal["xavier", "kaiming", "orthogonal", "svd", "layer-adaptive", "weight-adaptive"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Start:
    """What an initialisation did, to be undone and to be saved by.

    Attributes:
        initial: Where the base weights make up for the start: the factors at the start, on the
            CPU.
        weights: The base weights as they were, on the CPU.
    """

    initial: dict[str, Factors] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def restore(self, model: nn.Module) -> None:
        """Puts the base weights back, bit by bit; the adapter may be attached or gone."""
        modules = layers.linear_modules(model)
        with torch.no_grad():
            for name, weight in self.weights.items():
                modules[name].weight.copy_(weight)  # type: ignore[operator]

    def save(self, model: Any, folder: str | Path) -> None:
        """Saves the adapter such that plain PEFT loads it on the *original* base.

        Args:
            model: The ``PeftModel``.
            folder: Made if need be.

        Raises:
            UserError: When the folder cannot be written.
        """
        try:
            model.save_pretrained(str(folder), save_embedding_layers=False)
        except OSError as error:
            raise UserError(
                f"the adapter cannot be written to {str(folder)!r}: {error}"
            ) from error
        self.subtract(folder)

    def subtract(self, folder: str | Path) -> None:
        """Takes the start out of a saved adapter, as it was taken out of the base weights.

        Raises:
            UserError: When the folder cannot be read or written.
        """
        if not self.initial:
            return
        now = saved.read(folder)
        factors = {
            name: _difference(one, self.initial[name]) if name in self.initial else one
            for name, one in now.factors.items()
        }
        saved.write(folder, now.config, now.tensors, factors)


def initialise(
    model: nn.Module,
    kind: Kind,
    *,
    adapter: str = "default",
    both: bool = False,
    gain: float = 1.0,
    decay: float = 0.5,
    targets: Mapping[str, Tensor] | None = None,
    compensate: bool = True,
    keep_weights: bool = True,
    seed: int = 0,
) -> Start:
    """Begins an attached adapter anew.

    Args:
        model: A model with LoRA layers.
        kind: One of ``KINDS``.
        adapter: Name of the adapter.
        both: Whether B begins like A instead of with zeros.
        gain: Factor of A, and of B.
        decay: By how much layer-adaptive starts are smaller in the last block, 0 to 1.
        targets: Matrices (d, k) for ``svd``, by layer; the weight for layers left out.
        compensate: Whether the base weights make up for a start that is not zero.
        keep_weights: Whether to keep what they were, for :meth:`Start.restore`.
        seed: Source of randomness.

    Raises:
        UserError: When the model has no such adapter, or an argument is out of range.
    """
    if kind not in KINDS:
        raise UserError(f"there is no initialisation {kind!r}; there are {', '.join(KINDS)}")
    if not gain > 0:
        raise UserError(f"gain is a factor over 0, not {gain}")
    if not 0 <= decay <= 1:
        raise UserError(f"decay is a share from 0 to 1, not {decay}")
    if targets is not None and kind != "svd":
        raise UserError(f"targets go with the initialisation svd, not {kind}")
    found = layers.lora_layers(model, adapter)
    layers.chosen(found, targets or {})
    modules = layers.linear_modules(model)
    depths = layers.depths_of(found)
    generator = torch.Generator().manual_seed(seed)
    start = Start()
    for name, layer in found.items():
        weight = layers.weight_of(modules[name], name)
        if kind == "svd":
            target = (targets or {}).get(name, weight)
            a, b = _from_svd(name, target, layers.factors_of(layer, adapter), both, seed)
            a, b = gain * a, gain * b
        else:
            scale = gain * (1 - decay * depths[name] if kind == "layer-adaptive" else 1.0)
            d, k, r = *weight.shape, layer.r[adapter]
            a = scale * _drawn(kind, (r, k), weight, generator)
            b = scale * _drawn(kind, (d, r), weight, generator) if both else torch.zeros(d, r)
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(a)
            layer.lora_B[adapter].weight.copy_(b)
        if both and compensate:
            if keep_weights:
                own: Any = modules[name].weight
                start.weights[name] = own.detach().cpu().clone()
            _make_up(start, name, modules[name], layers.factors_of(layer, adapter))
    return start


def _drawn(
    kind: Kind, shape: tuple[int, int], weight: Tensor, generator: torch.Generator
) -> Tensor:
    out, into = shape
    if kind == "xavier":
        return _uniform(shape, math.sqrt(6 / (into + out)), generator)
    if kind == "layer-adaptive":
        return _uniform(shape, math.sqrt(1 / into), generator)
    normal = torch.randn(shape, generator=generator)
    if kind == "kaiming":
        return normal * math.sqrt(2 / into)
    if kind == "weight-adaptive":
        return normal * _deviation(weight, shape)
    # The sign makes the distribution uniform over orthogonal matrices.
    q, r = torch.linalg.qr(normal if out >= into else normal.T)
    q = q * torch.sign(torch.diagonal(r))
    return q if out >= into else q.T


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _deviation(weight: Tensor, shape: tuple[int, int]) -> float:
    found = spectrum.of_matrix(weight)
    share = found.effective_rank / min(weight.shape)
    # A Gaussian matrix has a spectral norm of about std * (sqrt rows + sqrt columns).
    bound = found.spectral_norm / (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    return min(float(weight.float().std()) * share, bound)


def _from_svd(
    name: str, target: Tensor, factors: Factors, both: bool, seed: int
) -> tuple[Tensor, Tensor]:
    if tuple(target.shape) != factors.shape:
        raise UserError(
            f"the target of {name} has the shape {tuple(target.shape)}, not {factors.shape}"
        )
    (d, k), r = factors.shape, factors.rank
    u, sigma, vh = spectrum.leading(target.detach().float(), r, seed=seed)
    count = len(sigma)
    a, b = torch.zeros(r, k), torch.zeros(d, r)
    if not both:
        a[:count] = vh.cpu()
        return a, b
    half = (sigma / factors.scaling).sqrt()
    a[:count] = (half[:, None] * vh).cpu()
    b[:, :count] = (u * half).cpu()
    return a, b


def _make_up(start: Start, name: str, module: nn.Module, factors: Factors) -> None:
    start.initial[name] = factors.kept()
    product = factors.scaling * factors.b.float() @ factors.a.float()
    with torch.no_grad():
        # A view, also of a weight that is stored transposed.
        whole = layers.weight_of(module, name)
        whole.copy_(whole.float() - product)


def _difference(now: Factors, start: Factors) -> Factors:
    a, b = start.a.to(now.a), start.b.to(now.b)
    return Factors(
        a=torch.cat([now.a, a], dim=0),
        b=torch.cat([now.b, -b * (start.scaling / now.scaling)], dim=1),
        scaling=now.scaling,
    )
