"""Which modules of a model compute with a text, and so have something to learn from it.

A model may hold more than a text passes through: towers for pictures and sound, layers whose
weights another module reads without calling them, keys of layers that take another layer's. An
adapter there would never train, and would be charged all the same. So one small forward pass is
watched, and the gradient of its loss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS, _LENGTH = 2, 8


def reached(model: PreTrainedModel, linears: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """Returns the names of the modules that a text passes through on its way to the loss.

    Args:
        model: A causal language model.
        linears: Input and output features of its linear modules. One of them counts where each
            token enters and leaves it in such features, and the loss depends on what leaves it.

    Raises:
        UserError: When transformers' own model fails.
    """
    marks: dict[str, list[Tensor]] = {}
    called: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        seen = partial(_marked, name, linears.get(name), marks, called)
        handles.append(module.register_forward_hook(seen))
    ids = _some_tokens(model)
    training = model.training
    # As in training: there some models take kernels that read the weights of modules directly.
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            if out.logits.requires_grad:
                out.logits.float().square().sum().backward()
    except Exception as error:
        kind = model.config.model_type
        raise UserError(
            f"model.name: transformers' own {kind} model fails on a few tokens of text: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    learns = {name for name, own in marks.items() if any(m.grad is not None for m in own)}
    return frozenset((called - linears.keys()) | with_siblings(learns, linears))


def _marked(
    name: str,
    features: tuple[int, int] | None,
    marks: dict[str, list[Tensor]],
    called: set[str],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    called.add(name)
    if features is None or not args or not isinstance(output, torch.Tensor):
        return output
    if (args[0].shape[-1], output.shape[-1]) != features:
        return output
    mark = torch.zeros(1, dtype=output.dtype, device=output.device, requires_grad=True)
    marks.setdefault(name, []).append(mark)
    return output + mark


def with_siblings(names: set[str], linears: Mapping[str, tuple[int, int]]) -> set[str]:
    """Adds to names of linear modules the experts that no token of a few was sent to."""
    kinds = {_without_expert(name) for name in names}
    return {name for name in linears if _without_expert(name) in kinds}


def _without_expert(name: str) -> tuple[str, ...]:
    # The first number is the layer's; an expert's comes after it.
    numbers, parts = 0, []
    for part in name.split("."):
        numbers += part.isdigit()
        parts.append("*" if part.isdigit() and numbers > 1 else part)
    return tuple(parts)


def _some_tokens(model: PreTrainedModel) -> Tensor:
    """Tokens from all over the vocabulary, none with a meaning of its own such as a picture's."""
    config = model.config.get_text_config()
    special: set[Any] = set()
    for part in (model.config, config):
        named = {k: v for k, v in part.to_dict().items() if k.endswith(("_token_id", "_index"))}
        for value in named.values():
            special.update(value if isinstance(value, list) else [value])
    count = _ROWS * _LENGTH
    plain = [token for token in range(config.vocab_size) if token not in special]
    chosen = [plain[len(plain) * i // count] for i in range(count)]
    return torch.tensor(chosen, device=model.device).view(_ROWS, _LENGTH)
