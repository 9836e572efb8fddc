"""The base model of a study: loaded once, frozen, adapted anew by each trial."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import architecture
from optuna_lora_rl.finetuning import attention
from optuna_lora_rl.finetuning import content
from optuna_lora_rl.finetuning import gguf
from optuna_lora_rl.finetuning import model_files
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning.architecture import Architecture
from optuna_lora_rl.finetuning.model_call import PLAIN
from optuna_lora_rl.finetuning.model_call import ModelCall
from optuna_lora_rl.finetuning.options import ModelOptions


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        name: Folder, as an absolute path, or hub name it came from; an adapter's
            ``base_model_name_or_path``. Of a model that a Python package carries, the hub name
            of the one that it was quantised from.
        revision: Its revision on the hub, None for the default one or for a folder.
        model: The model, in evaluation mode, nothing of it trainable.
        tokenizer: Its tokenizer, with a padding token.
        architecture: Its linear modules.
        fingerprint: Hash of what was loaded.
        call: How a trainer has to call it.
    """

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    fingerprint: str
    call: ModelCall = PLAIN


def path_of(options: ModelOptions) -> str:
    """Returns the folder or hub name that a model's name stands for.

    Raises:
        UserError: Where the package of a model that one carries is missing, or a GGUF file
            cannot be had.
    """
    from optuna_lora_rl import tiny

    if options.gguf_file is not None:
        return str(gguf.dequantised(_gguf_file(options)))
    if options.name in tiny.MODELS:
        return str(tiny.MODELS[options.name])
    if options.name in gguf.PACKAGED:
        return str(gguf.dequantised(gguf.PACKAGED[options.name].path()))
    path = Path(options.name).expanduser()
    return str(path.absolute()) if path.is_dir() else options.name


def _gguf_file(options: ModelOptions) -> Path:
    assert options.gguf_file is not None
    folder = Path(options.name).expanduser()
    if folder.is_dir():
        model_files.check(options)
        return folder / options.gguf_file
    try:
        with sources.no_waiting():
            return Path(
                hf_hub_download(options.name, options.gguf_file, revision=options.revision)
            )
    except Exception as error:
        raise UserError(f"model.name: {sources.failure('model', options.name, error)}") from None


def load(options: ModelOptions, device: torch.device) -> Base:
    """Loads model and tokenizer.

    Raises:
        UserError: When there is no such model, or it cannot be loaded.
    """
    model_files.check(options)
    name = path_of(options)
    local = Path(name).is_dir()
    shared: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    kernel = {}
    if options.attn_implementation is not None:
        kernel["attn_implementation"] = options.attn_implementation
    if not local:
        shared["revision"] = options.revision
    try:
        with nullcontext() if local else sources.no_waiting():
            tokenizer = AutoTokenizer.from_pretrained(name, **shared)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=_dtype(options.dtype, device),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kernel,
                **shared,
            )
    except Exception as error:
        raise UserError(f"model.name: {_failure(options, local, error)}") from None
    _check_whole(options.name, model, loaded)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.name: the tokenizer of {options.name!r} has neither a padding nor an "
                "end-of-sequence token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(device)
    model.requires_grad_(False)
    model.eval()
    if options.name in gguf.PACKAGED:
        # What an adapter's files name, so that others find it.
        model.name_or_path = gguf.PACKAGED[options.name].hub_name
    base = Base(
        name=model.name_or_path,
        revision=None if local else options.revision,
        model=model,
        tokenizer=tokenizer,
        architecture=architecture.read(model),
        fingerprint=_fingerprint(name, model),
    )
    attention.use_blocks(model)
    return base


def _check_whole(name: str, model: PreTrainedModel, loaded: Mapping[str, Any]) -> None:
    """Refuses a model that is not what was saved: transformers makes up what it does not find."""
    if model._hf_peft_config_loaded:
        raise UserError(
            f"model.name: {name!r} holds an adapter; merge it into its base model first "
            "(optuna-lora-rl merge), or name the base model"
        )
    for key, saved, wanted in sorted(loaded["mismatched_keys"]):
        raise UserError(
            f"model.name: {name!r} cannot be loaded: {key} has the shape {tuple(saved)} in its "
            f"file, and its config.json makes {tuple(wanted)} of it (such as an old vocab_size "
            "after the embeddings were resized)"
        )
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.name: {name!r} lacks weights of a {type(model).__name__}, which would begin "
            f"at random: {', '.join(missing[:3])}{rest}"
        )


def _failure(options: ModelOptions, local: bool, error: Exception) -> str:
    if options.attn_implementation is not None and re.search("attn|attention", f"{error}".lower()):
        reason = first_line(error)
        return f"attn_implementation {options.attn_implementation!r} cannot be used: {reason}"
    if local:
        reason = first_line(error)
        return f"the folder {options.name!r} cannot be loaded as a causal language model: {reason}"
    return sources.failure("model", options.name, error)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def _fingerprint(name: str, model: PreTrainedModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{model.dtype} {model.config._attn_implementation}".encode())
    folder = Path(name)
    if not folder.is_dir():
        digest.update(f"{name} {model.config._commit_hash}".encode())
        return digest.hexdigest()
    digest.update(content.of_model(folder).encode())
    return digest.hexdigest()


def twin(model: PreTrainedModel, own: Collection[str] = ()) -> PreTrainedModel:
    """Returns a second model with the weights of the first, which it shares.

    It can be patched, adapted and thrown away; its parameters are objects of their own that
    point to the same memory.

    Args:
        model: The first.
        own: Modules whose weights will be changed, and are therefore copied.
    """
    copied = {id(model.get_submodule(name).weight) for name in own}
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if type(parameter) is not nn.Parameter:
            # A quantised weight, which nothing changes.
            memo[id(parameter)] = parameter
            continue
        data = parameter.data.clone() if id(parameter) in copied else parameter.data
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    return copy.deepcopy(model, memo)
