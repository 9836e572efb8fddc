"""What a few batches say of each layer: the gradient of its weight, and its inputs.

Both are sums over the batches, of gradients G (d, k) and of second moments X^T X (k, k) of the
inputs X (tokens, k). Where those matrices are too large, a sketch with a Gaussian matrix Omega
(k, q) stands for them: G Omega / sqrt(q), whose squared norm is that of G in expectation, and
X^T X Omega, from which the Nystroem method (Tropp et al. 2017, arXiv 1706.05736, algorithm 3)
takes the leading eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.spectrum import Spectrum

# Second moments up to this width are kept whole.
_WHOLE_UP_TO = 2048
_SKETCH = 256


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    names: Iterable[str] | None = None,
    columns: int | None = None,
) -> dict[str, Spectrum]:
    """Decomposes the gradients of the base weights, summed over batches.

    The weights need not be trainable, and nothing of the model is changed.

    Args:
        model: The model, with or without an adapter.
        batches: What ``loss`` takes; each is read once.
        loss: Returns the loss of the model on a batch.
        names: Layers; None for all linear ones.
        columns: Keep of each gradient only a sketch of so many columns.

    Raises:
        UserError: When a name is no layer, a weight is quantised, or there is no batch.
    """
    modules = layers.linear_modules(model)
    wanted = layers.chosen(modules, names)
    sums: dict[str, Tensor] = {}
    hooks = []

    def taker(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            gradient = layers.outputs_first(gradient, modules[name]).float()
            if columns is not None:
                gradient = sketched(gradient, columns)
            sums[name] = sums[name] + gradient if name in sums else gradient

        return take

    weights: dict[str, Any] = {}
    for name in wanted:
        layers.weight_of(modules[name], name)
        weights[name] = modules[name].weight
    with _undisturbed(model), torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        try:
            for name, weight in weights.items():
                hooks.append(weight.register_post_accumulate_grad_hook(taker(name)))
            for batch in batches:
                loss(model, batch).backward()
        finally:
            for hook in hooks:
                hook.remove()
    if not sums:
        raise UserError("the gradients need at least one batch whose loss depends on the layers")
    shapes = layers.shapes_of(model)
    return {
        name: spectrum.of_matrix(sums[name])
        if name in sums
        else spectrum.of_values(torch.zeros(1), shapes[name])
        for name in wanted
    }


def activations(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
    *,
    names: Iterable[str] | None = None,
    mask: Callable[[Any], Tensor] | None = None,
) -> dict[str, Spectrum]:
    """Decomposes the inputs of the layers: values are those of X / sqrt(tokens).

    Args:
        model: The model, with or without an adapter.
        batches: What ``forward`` takes; each is read once.
        forward: Runs the model on a batch.
        names: Layers; None for all linear ones.
        mask: Says which tokens of a batch count, shape (sequences, length); None for all.

    Raises:
        UserError: When a name is no layer, or there is no batch.
    """
    modules = layers.linear_modules(model)
    wanted = layers.chosen(modules, names)
    moments: dict[str, _Moment] = {}
    counted: Tensor | None = None
    hooks = []

    def taker(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            if counted is not None and x.shape[:-1] == counted.shape:
                x = x[counted]
            moment = moments.setdefault(name, _Moment(x.shape[-1]))
            moment.add(x.reshape(-1, x.shape[-1]).float())

        return take

    with _undisturbed(model), torch.no_grad():
        try:
            for name in wanted:
                hooks.append(modules[name].register_forward_pre_hook(taker(name)))
            for batch in batches:
                counted = None if mask is None else mask(batch).bool()
                forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    if not moments:
        raise UserError("the activations need at least one batch that reaches the layers")
    return {name: moments[name].spectrum() for name in wanted if name in moments}


def sketched(matrix: Tensor, columns: int) -> Tensor:
    """Returns G Omega / sqrt(q), shape (d, q); the matrix itself where it is no wider.

    The same Omega for all matrices of one width, so that sketches can be compared.
    """
    k = matrix.shape[1]
    if k <= columns:
        return matrix
    return matrix @ _omega(k, columns).to(matrix) / columns**0.5


class GradientSketches:
    """Gathers gradients of the weights under LoRA layers while these train, as sketches.

    Between :meth:`start` and :meth:`stop` each backward pass adds delta^T x of its tokens, with x
    the layer's inputs and delta the gradient of its outputs: the gradient that the frozen weight
    would have.

    Args:
        found: The layers by name.
        columns: Width of a sketch.
    """

    def __init__(self, found: Mapping[str, nn.Module], columns: int = 128) -> None:
        self._layers = found
        self._columns = columns
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Begins, with nothing gathered."""
        self.stop()
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(self._taker(name)))

    def stop(self) -> dict[str, Tensor]:
        """Ends, and returns the sketches of the layers that were reached, shape (d, q)."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        sums, self._sums = self._sums, {}
        return sums

    def _taker(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            x = inputs[0].detach()

            def add(delta: Tensor) -> None:
                rows = x.reshape(-1, x.shape[-1]).float()
                k = rows.shape[1]
                if k > self._columns:
                    rows = rows @ _omega(k, self._columns).to(rows) / self._columns**0.5
                found = delta.reshape(len(rows), -1).float().T @ rows
                self._sums[name] = self._sums[name] + found if name in self._sums else found

            output.register_hook(add)

        return take


class _Moment:
    """The second moment of one layer's inputs, whole or sketched."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._omega = None if k <= _WHOLE_UP_TO else _omega(k, _SKETCH)
        self._sum: Any = 0.0
        self._energy = 0.0
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        self._tokens += x.shape[0]
        self._energy += float(x.square().sum())
        self._sum = self._sum + x.T @ (x if self._omega is None else x @ self._omega.to(x))

    def spectrum(self) -> Spectrum:
        count = max(self._tokens, 1)
        if self._omega is None:
            eigenvalues = torch.linalg.eigvalsh(self._sum.double() / count).flip(0)
        else:
            eigenvalues = _nystroem(self._sum.double().cpu() / count, self._omega.double())
        eigenvalues = eigenvalues.clamp_min(0.0)
        left = self._energy / count - float(eigenvalues.sum())
        tail = left if self._omega is not None else 0.0
        return spectrum.of_values(eigenvalues.sqrt(), (self._k, self._k), tail=tail)


def _nystroem(y: Tensor, omega: Tensor) -> Tensor:
    # The shift keeps the small matrix positive definite; it is taken off again.
    shift = float(torch.linalg.matrix_norm(y)) * 1e-10 + 1e-300
    y = y + shift * omega
    core = omega.T @ y
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if failed:
        # Numerically of lower rank: through its eigenvalues.
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > values[-1] * 1e-12
        half = y @ vectors[:, kept] / values[kept].sqrt()
    else:
        half = torch.linalg.solve_triangular(factor, y.T, upper=False).T
    return torch.linalg.svdvals(half).square() - shift


@cache
def _omega(k: int, columns: int) -> Tensor:
    return torch.randn(k, columns, generator=torch.Generator().manual_seed(k))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the model without dropout, and puts its modes, flags and gradients back."""
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    for parameter, _, _ in states:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trainable, gradient in states:
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
