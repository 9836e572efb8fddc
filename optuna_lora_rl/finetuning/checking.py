"""A base model is checked once, before the first trial.

What a trial optimises is computed by TRL and PEFT round the model, and where they and the model
do not fit together the loss is mostly wrong rather than absent. So a few rows go through both:
the model's own forward pass, each row by itself, and the trainer's, all rows in one batch. The
two losses must be the same. Then one small adapter on all that trials may adapt has to leave the
loss as it is, and to get a gradient everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from torch import nn
from transformers import PreTrainedModel

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.architecture import Architecture
from optuna_lora_rl.finetuning.attention import BY_BLOCKS
from optuna_lora_rl.finetuning.cache import once
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import is_out_of_memory
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import attached
from optuna_lora_rl.finetuning.lora import lora_config
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.model import Base
from optuna_lora_rl.finetuning.model_call import PLAIN
from optuna_lora_rl.finetuning.model_call import ModelCall
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.reached import with_siblings
from optuna_lora_rl.finetuning.targets import layer_indices
from optuna_lora_rl.finetuning.targets import select
from optuna_lora_rl.finetuning.tokens import Tokens
from optuna_lora_rl.rank.layers import lora_layers

_ROWS = 3
# Root mean square, over tokens, of what sums in two orders may lie apart; times the mean loss.
_TOLERANCES = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Kernels for batches differ more. No model is refused for that; only its own head is taken.
_SLACK = 3


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        loss: Mean cross-entropy of the rows' learnt tokens by the model's own forward pass.
        ours: The same by the trainer's.
        own_head: Whether the trainer has to leave the output head to the model.
        end_to_end: Whether it may lay the rows of a batch end to end.
        few: Whether it leaves the head to the model for few positions.
    """

    loss: float
    ours: float
    own_head: bool
    end_to_end: bool
    few: bool


def checked(
    base: Base,
    tokens: Tokens,
    training: TrainingOptions,
    device: torch.device,
    cache: Path | None,
) -> Base:
    """Returns the base model with what its check found, made once and kept.

    Args:
        base: The model.
        tokens: The tokenised examples.
        training: How every run trains.
        device: Where.
        cache: Folder where the result is kept; None for nowhere.

    Raises:
        UserError: When the model cannot be trained rightly.
    """
    _check_vocabulary(base, tokens)
    rows = _few(tokens.validation)
    facts = {
        "model": base.fingerprint,
        "device": device.type,
        "versions": [module.__version__ for module in (torch, transformers, peft, trl)],
        "training": training.model_dump(mode="json", include={"precision", "extra"}),
        "rows": [rows["input_ids"][:], rows["labels"][:]],
        "finds": [field.name for field in fields(Checked)],
    }

    def measure() -> dict[str, Any]:
        with quiet(), collected(), own_randomness(0):
            return asdict(_check(base, rows, training, device))

    found = Checked(**once(cache, "checks", facts, measure))
    # In 16 bits a CPU is quicker side by side than with torch's own kernel, whatever the lengths.
    kernel = base.model.config.get_text_config()._attn_implementation
    always = kernel == BY_BLOCKS and device.type == "cpu" and training.precision == "bf16"
    call = ModelCall(found.own_head, found.end_to_end, always=always, few=found.few)
    return replace(base, call=call)


def notes(base: Base) -> list[str]:
    """Returns what is worth knowing about a model, in sentences."""
    found = []
    if base.call.own_head:
        found.append(
            f"TRL's fused output head gives another loss than this {base.architecture.model_type} "
            "model; the model's own is taken, which needs the memory of all logits"
        )
    if base.architecture.left_out:
        found.append(
            f"no trial adapts {', '.join(base.architecture.left_out)}: they are no linear modules "
            "that PEFT adapts, or text does not pass through them"
        )
    return found


def check_targets(
    architecture: Architecture,
    targets: Iterable[str],
    layers: Iterable[str],
    target_sets: Mapping[str, Sequence[str]],
) -> None:
    """Checks that each choice of modules that a study may make is one in this model.

    Raises:
        UserError: When one names none, with those that name some, or layers are out of range.
    """
    found, missing = [], []
    for target in targets:
        try:
            select(architecture, target, "all", target_sets)
        except UserError:
            missing.append(target)
        else:
            found.append(target)
    if missing:
        leaves = sorted({linear.name.rpartition(".")[2] for linear in architecture.linears})
        rest = f"target_modules: [{', '.join(found)}]" if found else "target_modules: all-linear"
        raise UserError(
            f"space.target_modules: {', '.join(missing)} names no module of this "
            f"{architecture.model_type} model; write {rest}, or name some of its linear modules "
            f"under target_sets: [{', '.join(leaves)}]"
        )
    for layer in layers:
        layer_indices(layer, architecture.layers)


def _check(base: Base, rows: Dataset, training: TrainingOptions, device: torch.device) -> Checked:
    kind, dtype = base.architecture.model_type, base.model.dtype
    if not base.architecture.linears:
        raise UserError(
            f"model.name: this {kind} model has no linear module that text passes through and "
            "PEFT adapts"
        )
    own = own_losses(base.model, rows, device)
    _check_causal(base.model, rows, device)

    def trained(call: ModelCall) -> Tensor:
        with restored(base.model, {}), torch.no_grad():
            return sft.losses_of(
                base.model, base.tokenizer, rows, training, device=device, call=call
            )

    for call in (ModelCall(end_to_end=True, always=True), PLAIN, ModelCall(own_head=True)):
        try:
            ours = trained(call)
        except UserError:
            raise
        except Exception as error:
            # TRL's head expects of a model what not every one has, and so do rows end to end.
            if not call.own_head:
                continue
            raise UserError(
                f"model.name: TRL cannot compute the loss of a {kind} model: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if _agree(own, ours, dtype, slack=1):
            break
    if not _agree(own, ours, dtype):
        raise UserError(
            f"model.name: a {kind} model cannot be trained in batches: padded beside longer rows, "
            f"a few rows of the data have a loss of {ours.mean():.5f}, each by itself "
            f"{own.mean():.5f}"
        )
    if device.type == "cpu" and training.precision == "bf16" and not call.own_head:
        with suppress(Exception):
            few = replace(call, few=True)
            if _agree(own, trained(few), dtype, slack=1):
                call = few
    _check_adapter(base, rows, training, device, ours, call)
    return Checked(float(own.mean()), float(ours.mean()), call.own_head, call.end_to_end, call.few)


def own_losses(model: PreTrainedModel, rows: Dataset, device: torch.device) -> Tensor:
    """Returns the losses of the learnt tokens, of each row by itself and without padding."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        following = torch.tensor(row["labels"], device=device)[1:]
        try:
            with torch.no_grad():
                mask = torch.ones_like(ids)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            learnt = following != -100
            scores = logits[0, :-1].float()[learnt]
            found.append(nn.functional.cross_entropy(scores, following[learnt], reduction="none"))
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(
                    "model.name: there is no memory for one row of the data"
                ) from error
            raise UserError(
                f"model.name: transformers' own {model.config.model_type} model fails on a row of "
                f"the data: {type(error).__name__}: {first_line(error)}"
            ) from error
    return torch.cat(found)


def _check_causal(model: PreTrainedModel, rows: Dataset, device: torch.device) -> None:
    """Checks that what a token is predicted from ends before it."""
    ids = torch.tensor([max(rows["input_ids"], key=len)], device=device)
    changed = ids.clone()
    changed[0, -1] = next((token for token in ids[0] if token != ids[0, -1]), ids[0, -1])
    with torch.no_grad():
        before, after = (
            model(input_ids=i, attention_mask=torch.ones_like(i), use_cache=False).logits[0, :-1]
            for i in (ids, changed)
        )
    apart = (before - after).abs().max().item()
    largest = max(1.0, before.abs().max().item())
    undone = model.config.to_dict().get("is_decoder") is False
    if not apart <= _SLACK * _TOLERANCES[model.dtype] * largest:
        raise UserError(
            f"model.name: this {model.config.model_type} model sees the tokens that it should "
            "predict, so it is no causal language model"
            + ("; is_decoder: true in its config.json makes it one" if undone else "")
        )


def _check_adapter(
    base: Base,
    rows: Dataset,
    training: TrainingOptions,
    device: torch.device,
    untuned: Tensor,
    call: ModelCall,
) -> None:
    """Checks that an adapter begins as nothing, and that all of it can learn."""
    chosen = base.architecture.linears
    config = lora_config(Configuration.of({"lora_rank": 1}), base.architecture, chosen)
    with attached(base.model, config, chosen) as adapter:
        losses = sft.losses_of(
            adapter.model, base.tokenizer, rows, training, device=device, call=call
        )
        losses.mean().backward()
        learning = {
            name
            for name, layer in lora_layers(adapter.model).items()
            if layer.lora_B["default"].weight.grad is not None
        }
    kind = base.architecture.model_type
    begun = losses.detach()
    if not _agree(untuned, begun, base.model.dtype):
        raise UserError(
            f"model.name: an adapter that is still zero changes what a {kind} model computes: the "
            f"loss is {begun.mean():.5f} with it and {untuned.mean():.5f} without"
        )
    names = {linear.name: (linear.inputs, linear.outputs) for linear in chosen}
    idle = sorted(names.keys() - with_siblings(learning, names))
    if idle:
        raise UserError(
            f"model.name: adapters on {', '.join(idle[:5])} of this {kind} model get no gradient; "
            "name the others under target_sets"
        )


def _agree(one: Tensor, other: Tensor, dtype: torch.dtype, slack: float = _SLACK) -> bool:
    apart = float((one - other).square().mean().sqrt())
    return apart <= slack * _TOLERANCES[dtype] * max(1.0, float(one.mean()))


def _few(dataset: Dataset) -> Dataset:
    """A few short rows, of different lengths where there are such."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first = {length: row for row, length in reversed([(row, lengths[row]) for row in order])}
    chosen = list(dict.fromkeys([*list(first.values())[::-1][:_ROWS], *order[:_ROWS]]))
    return dataset.select(chosen[:_ROWS])


def _check_vocabulary(base: Base, tokens: Tokens) -> None:
    rows = base.model.get_input_embeddings().weight.shape[0]
    used = {base.tokenizer.pad_token_id}
    for dataset in (tokens.train, tokens.validation, tokens.test):
        if dataset is not None:
            used.update(max(ids) for ids in dataset["input_ids"])
    largest = max(used)
    if largest >= rows:
        raise UserError(
            f"model.name: the tokenizer of {base.name!r} makes token {largest} "
            f"({base.tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings "
            f"for tokens 0 to {rows - 1} only; use the model's own tokenizer, or save the model "
            "with resized embeddings (resize_token_embeddings)"
        )
