"""RMS norms with frozen weights in two steps of autograd's, there and back, under autocast.

transformers writes x / rms(x) * w as six operations, each of which autograd answers with one or
two of its own. Zhang and Sennrich (2019), arXiv 1910.07467.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.autograd.function import once_differentiable


class RootMeanSquare:
    """What a norm does, where it is one of these.

    Args:
        norm: The layer.
        offset: What is added to its weight, 0 or 1.
    """

    def __init__(self, norm: nn.Module, offset: int) -> None:
        self._norm = norm
        self._own = norm.forward
        self._offset = offset

    @classmethod
    def of(cls, norm: nn.Module) -> RootMeanSquare | None:
        """Returns it if the layer computes just that, as numbers show.

        Args:
            norm: Any layer.
        """
        weight = getattr(norm, "weight", None)
        if not type(norm).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
            return None
        if weight.dim() != 1 or weight.device.type != "cpu":
            return None
        if weight.dtype != torch.float32 or len([*norm.parameters()]) != 1:
            return None
        # Some take a gate beside their input, or several inputs.
        epsilon, takes = _epsilon(norm), inspect.signature(norm.forward).parameters
        if epsilon is None or len(takes) != 1:
            return None
        x = torch.linspace(-2.0, 3.0, 2 * len(weight)).view(2, -1)
        with torch.no_grad():
            for offset in (0, 1):
                if torch.allclose(norm(x), _RootMeanSquare.apply(x, weight + offset, epsilon)):
                    return cls(norm, offset)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight: Any = self._norm.weight
        mixed = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
        if not mixed or x.device.type != "cpu" or weight.requires_grad:
            own: Tensor = self._own(x)
            return own
        y: Tensor = _RootMeanSquare.apply(x, weight.detach() + self._offset, _epsilon(self._norm))
        return y


class _RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * w, of x (..., width), w (width,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        g = g * weight
        along = torch.linalg.vecdot(g, x).unsqueeze(-1)
        along.mul_(scale).mul_(scale).div_(-x.shape[-1])
        return g.addcmul_(x, along).mul_(scale), None, None


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
