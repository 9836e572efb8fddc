"""Attention of rows that lie end to end in one: of each to itself, and no others are computed.

To transformers such a row is one sequence whose mask is a diagonal of blocks. Its attention costs
the square of all tokens, of which the mask drops nearly all again. Here the rows are computed
apart, under the same mask's own part: whatever else it says (windows, chunks) goes on to count.

On a CPU in mixed precision rows of about the same length are laid side by side for that, and short
ones multiplied out: torch's kernel takes several times as long for them in bfloat16, above all on
the way back (a layer with 9 heads of 64, there and back: 8 rows of 72 tokens 12 ms one after the
other, 9 ms side by side, 2 ms multiplied out; of 400 tokens 48, 36 and 53 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers import AttentionMaskInterface
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_BLOCKS = "sdpa_by_blocks"
# Tokens of rows that are computed together: fewer would be no less work than the calls. The
# second was not measured.
_TOGETHER, _TOGETHER_ON_GPU = 128, 1024
# Rows up to this length are multiplied out on a CPU in 16 bits.
_SHORT = 256
# Rows lie side by side with the longest among them as long as little of that is padding.
_PADDED = 1.25


def use_blocks(model: PreTrainedModel) -> None:
    """Has a model with torch's attention compute by blocks where a call brings ``row_blocks``."""
    config = model.config
    plain = config.get_text_config() is config and model._can_set_attn_implementation()
    if config._attn_implementation == "sdpa" and plain:
        model.set_attn_implementation(BY_BLOCKS)


@dataclass(frozen=True)
class Rows:
    """Rows that lie end to end, for the layers of one pass.

    Attributes:
        parts: Begin and end of each block of rows that is computed together.
        groups: Rows of about the same length, for a CPU that computes in 16 bits. No others have
            any. Which type it is shows only inside the model, where autocast is on.
        places: Where each of the groups' tokens lies, (groups' tokens,).
        back: Where each token lies among the groups' tokens, (tokens,).
    """

    parts: list[tuple[int, int]]
    groups: list[_Group]
    places: Tensor
    back: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Rows:
        """Says how rows are computed.

        Args:
            lengths: The rows' lengths, in tokens.
            device: Where they are.
        """
        groups = _groups(lengths) if device.type == "cpu" else []
        none = torch.empty(0, dtype=torch.long)
        places = torch.cat([none, *(group.places.view(-1) for group in groups)])
        real = torch.cat([none.bool(), *(group.real.view(-1) for group in groups)])
        back = torch.empty(sum(lengths), dtype=torch.long)
        back[places[real]] = real.nonzero()[:, 0]
        return cls(_parts(lengths, device), groups, places, back)

    @property
    def seen(self) -> int:
        """Most tokens that a token is multiplied with."""
        return max(end - begin for begin, end in self.parts)


@dataclass(frozen=True)
class _Group:
    """R rows side by side, T tokens long.

    Attributes:
        places: Where each of their tokens lies, (R, T); a shorter row repeats its last token.
        real: Which are tokens of the row and no repetition, (R, T).
        masks: What is added to the scores, (R, 1, T, T), for each mask that was seen; layers
            have one or two masks between them.
    """

    places: Tensor
    real: Tensor
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the part of a mask of all tokens, (1, 1, tokens, tokens), as numbers to add."""
        known = self.masks.get(id(whole))
        if known is None:
            part = whole[0, 0][self.places[:, :, None], self.places[:, None, :]]
            if part.dtype == torch.bool:
                part = torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, -torch.inf)
            part = part.masked_fill(~self.real[:, None, :], -torch.inf)
            # With the mask itself, whose id must not be another's meanwhile.
            known = self.masks[id(whole)] = (whole, part[:, None].to(dtype))
        return known[1]


def _groups(lengths: Sequence[int]) -> list[_Group]:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[groups[-1][0]] <= _PADDED * lengths[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    made = []
    for rows in groups:
        own = torch.tensor([[lengths[row]] for row in rows])
        along = torch.arange(lengths[rows[0]])[None]
        made.append(_Group(starts[rows][:, None] + torch.minimum(along, own - 1), along < own))
    return made


def _parts(lengths: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
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
    row_blocks: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    whole = attention_mask is None or kwargs.get("position_bias") is not None
    if row_blocks is None or whole:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    if row_blocks.groups and torch.is_autocast_enabled("cpu"):
        # Positions turn queries and keys in float32, which torch's kernel casts back.
        kept_in = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(kept_in) for x in (query, key, value))
    if row_blocks.groups and query.itemsize == 2:
        return _side_by_side(module, query, key, value, attention_mask, row_blocks, **kwargs), None
    parts = []
    for begin, end in row_blocks.parts:
        own = slice(begin, end)
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        mask = attention_mask[:, :, own, own]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    # (1, tokens, heads, width)
    return torch.cat(parts, dim=1), None


def _side_by_side(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    rows: Rows,
    **kwargs: Any,
) -> Tensor:
    """Computes the rows group by group, (1, tokens, heads, width)."""
    shapes = [group.places.shape for group in rows.groups]
    counts = [group.places.numel() for group in rows.groups]
    laid = (
        _Laid.apply(x[0].transpose(0, 1), rows.places, rows.back).split(counts)
        for x in (query, key, value)
    )
    found = []
    for group, shape, *parts in zip(rows.groups, shapes, *laid, strict=True):
        q, k, v = (part.unflatten(0, shape) for part in parts)
        mask = group.mask(attention_mask, query.dtype)
        if shape[1] <= _SHORT:
            out = _multiplied_out(module, q, k, v, mask, **kwargs)
        else:
            heads = (x.transpose(1, 2) for x in (q, k, v))
            out = sdpa_attention_forward(module, *heads, mask, **kwargs)[0]
        found.append(out.flatten(0, 1))
    together = torch.cat(found) if len(found) > 1 else found[0]
    return _Back.apply(together, rows).unsqueeze(0)


class _Laid(torch.autograd.Function):
    """Tokens x (tokens, ...) as the groups have them.

    A token that only repeats another sends nothing back: it is masked where it is looked at, and
    what it sees is dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g.index_select(0, ctx.back), None, None


class _Back(torch.autograd.Function):
    """The groups' tokens x (groups' tokens, ...) end to end again, without those that repeat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        found = g.new_zeros(len(ctx.rows.places), *g.shape[1:])
        return found.index_copy_(0, ctx.rows.back, g), None


def _multiplied_out(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of short rows (R, T, heads, width), the same shape.

    Query heads that share a key head are multiplied with it as one.
    """
    rows, tokens, heads, width = q.shape
    own = k.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    q = q.unflatten(2, (own, heads // own)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = (q @ k.mT).view(rows, own, heads // own, tokens, tokens)
    weights = torch.add(mask[:, :, None], scores, alpha=scale).softmax(dim=-1)
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = (weights.flatten(2, 3) @ v).unflatten(2, (heads // own, tokens))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


AttentionInterface.register(BY_BLOCKS, _attention)
AttentionMaskInterface.register(BY_BLOCKS, sdpa_mask)
