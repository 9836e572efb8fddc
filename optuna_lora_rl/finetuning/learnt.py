"""Only learnt positions go through the output head.

Of a prompt and its completion only the completion is learnt. On a GPU TRL projects those
positions alone; on a CPU it projects all and drops the others, which for short answers and a
small model is a third of all computing. TRL's own argument ``shift_labels`` takes the selected
positions as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

_IGNORED = -100


@contextmanager
def learnt_only(
    model: PreTrainedModel | PeftModel, inputs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Selects, for one call of the model, the positions whose next token is learnt.

    Args:
        model: The model that will be called.
        inputs: A batch with ``labels`` (sequences, length).

    Yields:
        The batch to call it with: ``shift_labels`` (1, learnt positions) in the labels' place.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: Any = whole.base_model
    labels = inputs.get("labels")
    if labels is None or labels.device.type != "cpu" or backbone is whole:
        yield inputs
        return
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    learnt = following != _IGNORED
    if not learnt.any():
        yield inputs
        return
    own, patched = backbone.forward, "forward" in backbone.__dict__

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[learnt].unsqueeze(0)
        return outputs

    backbone.forward = forward
    try:
        others = {name: value for name, value in inputs.items() if name != "labels"}
        yield {**others, "shift_labels": following[learnt].unsqueeze(0)}
    finally:
        if patched:
            backbone.forward = own
        else:
            del backbone.forward
