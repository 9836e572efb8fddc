"""The model's own output head in place of TRL's fused one.

TRL multiplies the last hidden states by the head's weights, tile by tile, which spares the memory
of all logits. Heads that are more than this one product (a transform before it, as in BERT, or
a cap behind it that TRL does not know) come out wrong that way, without a word.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

_IGNORED = -100


def use_own(model: PreTrainedModel) -> None:
    """Lets the model's own forward make the logits, after TRL's trainer gave it a fused head."""
    fused = model.forward

    @wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
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
    scores = torch.log_softmax(logits[learnt].float(), dim=-1)
    wanted = labels[learnt]

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter(learnt, values)

    log_probs = placed(scores.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / learnt.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=placed(-(scores.exp() * scores).sum(dim=-1)),
        is_top1=placed(scores.argmax(dim=-1) == wanted),
        label_mask=learnt,
        aux_loss=aux_loss,
    )
