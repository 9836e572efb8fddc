"""Attention of rows that lie end to end in one: of each to itself, and no others are computed.

To transformers such a row is one sequence whose mask is a diagonal of blocks. Its attention costs
the square of all tokens, of which the mask drops nearly all again. Here the blocks are computed
by themselves, a few short rows at a time, under the same mask's own part: whatever else it says
(windows, chunks) goes on to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import nn
from transformers import AttentionInterface
from transformers import AttentionMaskInterface
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_BLOCKS = "sdpa_by_blocks"
# Tokens of rows that are computed together: fewer would be no less work than the calls. The
# second was not measured.
_TOGETHER, _TOGETHER_ON_GPU = 128, 1024


def use_blocks(model: PreTrainedModel) -> None:
    """Has a model with torch's attention compute by blocks where a call brings ``row_blocks``."""
    config = model.config
    plain = config.get_text_config() is config and model._can_set_attn_implementation()
    if config._attn_implementation == "sdpa" and plain:
        model.set_attn_implementation(BY_BLOCKS)


def blocks(lengths: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
    """Cuts rows that lie end to end into blocks of whole rows.

    Args:
        lengths: The rows' lengths, in tokens.
        device: Where they are.

    Returns:
        Begin and end of each block.
    """
    together = _TOGETHER if device.type == "cpu" else _TOGETHER_ON_GPU
    found, begin, end = [], 0, 0
    for length in lengths:
        if end > begin and end + length - begin > together:
            found.append((begin, end))
            begin = end
        end += length
    return [*found, (begin, end)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_blocks: Sequence[tuple[int, int]] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    whole = attention_mask is None or kwargs.get("position_bias") is not None
    if whole or len(row_blocks) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    parts = []
    for begin, end in row_blocks:
        own = slice(begin, end)
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        mask = attention_mask[:, :, own, own]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    # (1, tokens, heads, width)
    return torch.cat(parts, dim=1), None


AttentionInterface.register(BY_BLOCKS, _attention)
AttentionMaskInterface.register(BY_BLOCKS, sdpa_mask)
