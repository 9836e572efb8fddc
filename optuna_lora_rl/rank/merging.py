"""Adapters merged into their base models.

PEFT adds an adapter's updates to the base weights in place. Where the embedding and the output
head are one matrix, an update of one of them would be added to both, so the two are parted first.
What was written is read again, and its logits are held against the adapter's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import truncation
from optuna_lora_rl.rank.saved import SavedAdapter

_TOKENS = 32


def merge(
    base: str | Path, adapter: str | Path, target: str | Path, *, revision: str | None = None
) -> int:
    """Merges a saved adapter into its base model and saves that as an ordinary model folder.

    Args:
        base: Folder or hub name of the base model.
        adapter: Folder of the adapter.
        target: Folder that is written, with the tokenizer; it must not exist or be empty.
        revision: The base model's revision on the hub.

    Returns:
        The bytes of the folder.

    Raises:
        UserError: When one of them cannot be read or written, the adapter is of another model, or
            the merged model would not compute what base and adapter do.
    """
    own, target = saved.read(adapter), Path(target)
    if own.config.get("layer_replication"):
        raise UserError(
            f"the adapter in {str(adapter)!r} repeats layers of its base (layer_replication), "
            "and a merged model cannot"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output: {target} exists and is not empty; choose another folder")
    try:
        before, wanted, dtype = _write(str(base), own, target, revision)
        _check(target, before, wanted, dtype)
    except Exception as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        # The first line of PEFT's errors says of which class, and the next what.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the adapter {str(adapter)!r} cannot be merged into {str(base)!r}: {reason}"
        ) from error
    return truncation.bytes_of(target)


def _write(
    base: str, own: SavedAdapter, target: Path, revision: str | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Writes the merged model; returns the logits of the base and of the adapter on it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    has_tokenizer = (own.folder / "tokenizer_config.json").exists()
    source = str(own.folder) if has_tokenizer else base
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    model: Any = AutoModelForCausalLM.from_pretrained(base, revision=revision)
    _resize(model, own)
    own.check_fits(layers.shapes_of(model, with_head=True), base)
    before = _logits(model)
    adapted: Any = PeftModel.from_pretrained(model, str(own.folder)).eval()
    wanted = _logits(adapted)
    _part(adapted.get_base_model())
    adapted.merge_and_unload().save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    return before, wanted, model.dtype


def _resize(model: Any, own: SavedAdapter) -> None:
    """Gives the model as many tokens as the embedding has that the adapter brings along."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    for end in ("weight", "base_layer.weight"):
        brought = own.tensors.get(f"{layers.PREFIX}{name}.{end}")
        if brought is not None and len(brought) != len(embedding.weight):
            model.resize_token_embeddings(len(brought), mean_resizing=False)


def _part(model: Any) -> None:
    """Gives the output head weights of its own, where the adapter is on it or the embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    sides = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(side, BaseTunerLayer) for side in sides):
        return
    embedding, head = (
        side.get_base_layer() if isinstance(side, BaseTunerLayer) else side for side in sides
    )
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _logits(model: Any) -> Tensor:
    count = min(_TOKENS, len(model.get_input_embeddings().weight))
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(count)[None], use_cache=False).logits
    return logits.float()


def _check(target: Path, before: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    found = _logits(AutoModelForCausalLM.from_pretrained(str(target)))
    effect, error = (float((wanted - other).abs().max()) for other in (before, found))
    rounding = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    # Rounding may take of the effect, but not most of it.
    if not error <= rounding + effect / 2:
        raise UserError(
            f"the merged model would not be the adapter on its base: logits {error:.3g} off, "
            f"where the adapter's effect is {effect:.3g} (weights of {dtype})"
        )
