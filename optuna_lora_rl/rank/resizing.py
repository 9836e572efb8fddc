"""LoRA layers that get another rank in the middle of training.

Notations
---------
A, B      factors of shape (r, k) and (d, r); s the scaling; r' the new rank
U S V^T   singular value decomposition of B A, cut to r' values

Growing appends rows to A and zero columns to B, so that B A stays what it was to the last bit.

Shrinking takes the best approximation of B A of rank r' (Eckart & Young 1936), found from QR
decompositions of the factors without forming B A. It is split as A' = c V^T, B' = U S / c with c
the root mean square norm of A's rows: in LoRA's usual start A is large and B zero, and the step
that a learning rate means depends on their sizes, so these are kept rather than balanced. Where
B A has no r' directions, as at the start, further rows of A' come from what A spans.

Adam's moments follow. New rows and columns begin with zeros, as new parameters do. In shrinking
B' = B M with M = A A'^T / c^2, and A' = T A with T = A' A^+, so the gradients change to M^T dA
and dB T^T, and first moments with them. Second moments are sums of squares: those of a sum of
uncorrelated gradients, (M*M)^T v_A and v_B (T*T)^T.

The scaling s stays: alpha changes with r. Layers, configuration (``rank_pattern``,
``alpha_pattern``) and optimizer hold the new state afterwards, so that the saved adapter loads in
plain PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank.layers import Factors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NewRows = Literal["kaiming", "orthogonal"]
NewMoments = Literal["zero", "mean"]
# Optimizer states that hold squares of gradients: Adam, AMSGrad, RMSprop, Adagrad.
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
# Variants of LoRA that are not a product of two trained factors, or tie them to a rank.
_PLAIN = ("DoraLinearVariant",)


@dataclass(frozen=True)
class Resized:
    """One layer's change of rank.

    Attributes:
        name: The layer.
        before: Its rank before.
        after: Its rank now.
        error: What of the update was lost, in Frobenius norm relative to the update.
    """

    name: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class _Change:
    """New factors, and the linear maps by which moments follow: shapes (r', r)."""

    a: Tensor
    b: Tensor
    for_a: Tensor
    for_b: Tensor
    error: float = 0.0


def resize(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    adapter: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    new_rows: NewRows = "kaiming",
    new_moments: NewMoments = "zero",
    generator: torch.Generator | None = None,
) -> list[Resized]:
    """Gives layers of an attached adapter other ranks, in place.

    To be called between two steps of the optimizer: gradients are dropped.

    Args:
        model: A model with LoRA layers.
        ranks: New ranks by layer; the others stay.
        adapter: Name of the adapter.
        optimizer: The optimizer that trains it, whose parameters and state follow; states other
            than of the parameters' shapes (8-bit, factored) begin anew.
        new_rows: How rows of A begin when a layer grows: uniform as PEFT's (``kaiming``), or
            orthogonal to A's rows and of their size, as long as there are directions left.
        new_moments: What second moments begin with when a layer grows: zeros, or the mean of
            those that are there, so that the first steps are no longer than those of old
            directions.
        generator: Source of randomness, on the CPU; None for torch's own.

    Returns:
        What changed; layers that have the rank already are left out.

    Raises:
        UserError: When a layer is unknown or cannot be resized, or a rank is out of range;
            nothing is changed then.
    """
    found = layers.lora_layers(model, adapter)
    layers.chosen(found, ranks)
    for name, rank in ranks.items():
        _check(name, found[name], rank, adapter)
    changed = []
    for name, rank in ranks.items():
        layer = found[name]
        before = layer.r[adapter]
        if rank == before:
            continue
        change = (
            _grown(layers.factors_of(layer, adapter), rank, new_rows, generator)
            if rank > before
            else shrunk(layers.factors_of(layer, adapter), rank)
        )
        _put(layer, adapter, change, optimizer, new_moments)
        _write_down(model, name, layer, adapter)
        changed.append(Resized(name, before, rank, change.error))
    return changed


def best_approximation(factors: Factors, rank: int) -> Factors:
    """Returns the best approximation of an update of a smaller rank, at the same scaling."""
    change = shrunk(factors, rank)
    return Factors(a=change.a, b=change.b, scaling=factors.scaling)


def shrunk(factors: Factors, rank: int) -> _Change:
    """Finds the best approximation of B A; see the module's docstring."""
    a, b = factors.a.double(), factors.b.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    # Beyond min(d, k) values there are none, but rows of A may still be asked for.
    count = min(rank, len(s))
    c = float(a.square().sum(1).mean().sqrt()) or 1.0
    new_a = c * vh[:rank] @ q_a.T
    new_b = torch.zeros(b.shape[0], rank, dtype=b.dtype, device=b.device)
    new_b[:, :count] = (q_b @ u[:, :count]) * s[:count] / c
    if len(new_a) < rank:
        new_a = torch.cat([new_a, new_a.new_zeros(rank - len(new_a), a.shape[1])])
    lost = float(s[count:].square().sum().sqrt())
    whole = float(s.square().sum().sqrt())
    return _Change(
        a=new_a.to(factors.a.dtype),
        b=new_b.to(factors.b.dtype),
        for_a=new_a @ a.T / c**2,
        for_b=new_a @ torch.linalg.pinv(a),
        error=lost / whole if whole else 0.0,
    )


def _grown(
    factors: Factors, rank: int, new_rows: NewRows, generator: torch.Generator | None
) -> _Change:
    a, b = factors.a, factors.b
    count, k = rank - a.shape[0], a.shape[1]
    if new_rows == "orthogonal":
        rows = _orthogonal(a, count, generator)
    else:
        # kaiming_uniform_ with a = sqrt(5): bounds of 1 / sqrt(fan in).
        rows = (2 * torch.rand(count, k, generator=generator) - 1) / k**0.5
    same = torch.eye(rank, a.shape[0], dtype=torch.float64, device=a.device)
    return _Change(
        a=torch.cat([a, rows.to(a)]),
        b=torch.cat([b, b.new_zeros(b.shape[0], count)], dim=1),
        for_a=same,
        for_b=same,
    )


def _orthogonal(a: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Rows orthogonal to A's and to one another while there are such, then random ones."""
    k = a.shape[1]
    size = float(a.double().square().sum(1).mean().sqrt()) or (1 / 3) ** 0.5
    known = torch.linalg.qr(a.double().T).Q
    rows = torch.randn(count, k, generator=generator, dtype=torch.float64).to(a.device)
    free = max(0, min(count, k - known.shape[1]))
    for _ in range(2):
        rows[:free] -= rows[:free] @ known @ known.T
    rows[:free] = torch.linalg.qr(rows[:free].T).Q.T
    return size * rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _check(name: str, layer: LoraLayer, rank: int, adapter: str) -> None:
    if rank < 1:
        raise UserError(f"the rank of {name} is at least 1, not {rank}")
    variant = type(layer.lora_variant.get(adapter)).__name__
    if adapter in layer.lora_variant and variant not in _PLAIN:
        raise UserError(f"{name} cannot change its rank: {variant} fixes what its factors are")
    if layer.merged:
        raise UserError(f"{name} cannot change its rank while the adapter is merged")


def _put(
    layer: LoraLayer,
    adapter: str,
    change: _Change,
    optimizer: torch.optim.Optimizer | None,
    new_moments: NewMoments,
) -> None:
    before, after = layer.r[adapter], change.a.shape[0]
    into_a, out_of_b = layer.lora_A[adapter], layer.lora_B[adapter]

    def along_rows(weights: Tensor, state: Tensor) -> Tensor:
        return weights @ state

    def along_columns(weights: Tensor, state: Tensor) -> Tensor:
        return state @ weights.T

    for linear, value, weights, follow, dim in (
        (into_a, change.a, change.for_a, along_rows, 0),
        (out_of_b, change.b, change.for_b, along_columns, 1),
    ):
        old = linear.weight
        new = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
        linear.weight = new
        if optimizer is not None:
            fill = new_moments == "mean" and after > before
            _hand_over(optimizer, old, new, weights, follow, dim if fill else None)
    into_a.out_features = out_of_b.in_features = after
    use_rslora = bool(layer.use_rslora[adapter])
    # A scaling set by hand (set_scale) stays too: alpha changes by what r did.
    unit = layers.scaling_of(layer.lora_alpha[adapter], before, use_rslora)
    layer.lora_alpha[adapter] = layers.alpha_of(unit, after, use_rslora)
    layer.r[adapter] = after


def _hand_over(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    weights: Tensor,
    follow: Callable[[Tensor, Tensor], Tensor],
    fill: int | None,
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state:
        return
    if any(
        isinstance(value, Tensor) and value.ndim > 0 and value.shape != old.shape
        for value in state.values()
    ):
        return
    followed: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            followed[key] = value
            continue
        square = key in _SQUARES
        moved = follow(weights.square() if square else weights, value.double()).to(value.dtype)
        if square and fill is not None:
            known = old.shape[fill]
            moved.narrow(fill, known, moved.shape[fill] - known).copy_(
                value.mean(fill, keepdim=True)
            )
        followed[key] = moved.contiguous()
    optimizer.state[new] = followed


def _write_down(model: nn.Module, name: str, layer: LoraLayer, adapter: str) -> None:
    """Keeps the configuration true, from which a saved adapter is rebuilt."""
    config = model.peft_config[adapter]  # type: ignore[index]
    key = layers.exactly(name)
    for pattern, value in (
        ("rank_pattern", layer.r[adapter]),
        ("alpha_pattern", layer.lora_alpha[adapter]),
    ):
        others = {k: v for k, v in getattr(config, pattern).items() if k != key}
        # PEFT takes the first key that matches.
        setattr(config, pattern, {key: value, **others})
