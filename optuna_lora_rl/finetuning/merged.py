"""Evaluations with the adapter's updates added to the base weights.

While nothing is trained, x W' + s (x A') B' is x (W + s B A)': one product instead of three, and
no sums of activations. In float32 the two differ by rounding alone; in shorter formats the sum
would lose of the update what W's own rounding takes, so there the adapter stays beside its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

# For its time the sums lie beside the weights; of larger models they could be what does not fit.
_MOST_BYTES = 2**30


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Adds each update to its weight where that is exact, and puts the very weights back.

    Args:
        model: The model, whose base weights nobody else computes with meanwhile.
    """
    embedded = model.get_input_embeddings().weight
    found: list[Any] = [
        layer
        for layer in model.modules()
        # Not a quantised layer, DoRA or another variant, nor a head that is the embeddings too.
        if isinstance(layer, Linear)
        and not layer.lora_variant
        and layer.get_base_layer().weight is not embedded
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in layer.parameters())
    ]
    weights = [layer.get_base_layer().weight for layer in found]
    if sum(weight.nbytes for weight in weights) > _MOST_BYTES:
        found, weights = [], []
    originals = [weight.data for weight in weights]
    try:
        for layer, weight in zip(found, weights, strict=True):
            weight.data = weight.data + layer.get_delta_weight("default").detach()
            layer.merged_adapters.append("default")
        yield
    finally:
        for layer, weight, original in zip(found, weights, originals, strict=True):
            weight.data = original
            layer.merged_adapters.clear()
