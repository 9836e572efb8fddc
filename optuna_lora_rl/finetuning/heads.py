"""The model's own output head in place of TRL's fused one.

TRL multiplies the last hidden states by the head's weights, tile by tile, which spares the memory
of all logits. Heads that are more than this one product (a transform before it, as in BERT, or
a cap behind it that TRL does not know) come out wrong that way, without a word. On a CPU the tiles
also take several times as long as the product itself: each casts its part of the weights, three
times a step, and goes back in float32.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

_IGNORED = -100
# Logits that are held at once where tiles would do: 1 GB in bfloat16, and as much of gradient.
# TRL's tiles on a CPU take some 2.7 GB themselves.
FEW = 2**29
# Positions whose scores are computed at once: what is made of them stays in the cache.
_TILE = 16


def use_own(model: PreTrainedModel, most: int | None = None) -> None:
    """Lets the model's own forward make the logits, after TRL's trainer gave it a fused head.

    Args:
        model: The base model.
        most: Leave calls to TRL's head that do not say which positions they learn, or that would
            make more logits than these; None for no call.
    """
    fused = model.forward
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)

    @wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        if most is not None:
            selected = kwargs.get("shift_labels")
            if selected is None or selected.numel() * vocabulary > most:
                return fused(*args, fused_lm_head=True, **kwargs)
        labels, following = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        outputs = fused(*args, **{**kwargs, "use_cache": False})
        logits = outputs.logits
        if following is None:
            logits, following = logits[:, :-1], labels[:, 1:]
        return _scored(logits, following, outputs.get("aux_loss"))

    model.forward = forward


def _scored(logits: Tensor, labels: Tensor, aux_loss: Tensor | None) -> FusedCausalLMOutput:
    """Makes what TRL's fused head makes: of each learnt position, and 0 at all others."""
    learnt = labels != _IGNORED
    # Where all are learnt, not a copy.
    chosen = logits.flatten(0, 1) if learnt.all() else logits[learnt]
    found, entropy, is_top1 = _Scores.apply(chosen, labels[learnt])

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter(learnt, values)

    log_probs = placed(found)
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / learnt.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=placed(entropy),
        is_top1=placed(is_top1),
        label_mask=learnt,
        aux_loss=aux_loss,
    )


class _Scores(torch.autograd.Function):
    """Log-probabilities of the wanted tokens, the entropies, and which are the likeliest, (n,).

    From logits (n, vocabulary), a few positions at a time in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for part, own in zip(logits.split(_TILE), wanted.split(_TILE), strict=True):
            scores = part.float()
            total = scores.logsumexp(dim=-1)
            scores = scores - total[:, None]
            log_probs = scores.gather(-1, own[:, None])[:, 0]
            is_top1 = scores.argmax(dim=-1) == own
            parts.append((log_probs, -(scores.exp() * scores).sum(dim=-1), is_top1, total))
        log_probs, entropy, is_top1, total = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        ctx.save_for_backward(logits, wanted, total)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, wanted, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for begin in range(0, len(logits), _TILE):
            own = slice(begin, begin + _TILE)
            part = (logits[own].float() - total[own, None]).exp_()
            part.mul_(-g[own, None]).scatter_add_(1, wanted[own, None], g[own, None])
            gradient[own] = part
        return gradient, None
