"""A model computes what is learnt, and what that is computed from, and nothing else.

Of a prompt and its completion only the completion is learnt. On a GPU TRL projects those
positions alone; on a CPU it projects all and drops the others, which for short answers and a
small model is a third of all computing. TRL's own argument ``shift_labels`` takes the selected
positions as well.

The rows of a batch are of different lengths. Instead of padding they are laid end to end in one
row: positions begin again with each, from which transformers makes a mask so that each attends to
itself alone (Krell et al., 2021, "Efficient sequence packing without cross-contamination").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch import nn
from transformers import PreTrainedModel

from optuna_lora_rl.finetuning import attention
from optuna_lora_rl.finetuning.options import FLASH_ATTENTION

_IGNORED = -100


@dataclass(frozen=True)
class ModelCall:
    """How a trainer calls a model, so that it computes what the model does.

    Attributes:
        own_head: Whether logits come from the model's own forward; TRL's fused head computes
            those of some architectures wrong.
        end_to_end: Whether the rows of a batch may be laid end to end in one.
        always: Whether they are, even where it saves no tokens.
        few: Whether logits of few positions come from the model's own forward, since TRL's head
            takes longer.
    """

    own_head: bool = False
    end_to_end: bool = False
    always: bool = False
    few: bool = False


PLAIN = ModelCall()


@contextmanager
def learnt_only(
    model: PreTrainedModel | PeftModel, inputs: dict[str, Any], call: ModelCall = PLAIN
) -> Iterator[dict[str, Any]]:
    """Selects, for one call of the model, the positions whose next token is learnt.

    Args:
        model: The model that will be called.
        inputs: A batch with ``labels`` (sequences, length).
        call: Whether the head takes selected positions, and whether rows are laid end to end.

    Yields:
        The batch to call it with: ``shift_labels`` (1, learnt positions) in the labels' place.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: Any = whole.base_model
    labels = inputs.get("labels")
    if call.own_head or labels is None or backbone is whole:
        yield inputs
        return
    laid = call.end_to_end and _may_be_laid(inputs) and (call.always or _saves(whole, inputs))
    if labels.device.type != "cpu" and not laid:
        yield inputs
        return
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    learnt = following != _IGNORED
    if not learnt.any():
        yield inputs
        return
    selected = {name: value for name, value in inputs.items() if name != "labels"}
    if laid:
        present = selected.pop("attention_mask").bool()
        selected |= _end_to_end(whole, selected["input_ids"], present)
        following, learnt = (part[present].unsqueeze(0) for part in (following, learnt))
    selected["shift_labels"] = following[learnt].unsqueeze(0)
    own, patched = backbone.forward, "forward" in backbone.__dict__

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[learnt].unsqueeze(0)
        return outputs

    backbone.forward = forward
    try:
        yield selected
    finally:
        if patched:
            backbone.forward = own
        else:
            del backbone.forward


def _may_be_laid(inputs: dict[str, Any]) -> bool:
    mask = inputs.get("attention_mask")
    known = {"input_ids", "attention_mask", "labels"}
    return mask is not None and mask.dim() == 2 and inputs.keys() == known


def _saves(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether rows end to end are less work than padded."""
    rows, length = inputs["attention_mask"].shape
    tokens = int(inputs["attention_mask"].sum())
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
    seen, kernel = tokens, _kernel(model)
    if kernel in FLASH_ATTENTION:
        seen = length
    elif kernel == attention.BY_BLOCKS:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        seen = attention.Rows.of(lengths, inputs["labels"].device).seen
    return tokens * _work(hidden, seen) < rows * length * _work(hidden, length)


def _work(hidden: int, seen: int) -> int:
    """What a token costs in a layer: its products with the weights, and those with other tokens.

    These are about 12 hidden^2 and 2 hidden * seen. A product in attention takes about three
    times as long as one with a weight (measured on a CPU, 576 wide and 400 tokens).
    """
    return 6 * hidden + 3 * seen


def _end_to_end(model: PreTrainedModel, ids: Tensor, present: Tensor) -> dict[str, Any]:
    positions = present.cumsum(dim=1) - 1
    laid = {
        "input_ids": ids[present].unsqueeze(0),
        "position_ids": positions[present].unsqueeze(0),
        # With a cache transformers would not look for where rows begin.
        "use_cache": False,
    }
    if _kernel(model) == attention.BY_BLOCKS:
        laid["row_blocks"] = attention.Rows.of(present.sum(dim=1).tolist(), ids.device)
    return laid


def _kernel(model: PreTrainedModel) -> str | None:
    kernel: str | None = model.config.get_text_config()._attn_implementation
    return kernel
