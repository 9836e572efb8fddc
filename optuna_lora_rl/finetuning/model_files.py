"""What can be seen of a base model before it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import gguf
from optuna_lora_rl.finetuning.options import ModelOptions

# What the hub takes: no double dashes or dots, and letters or digits at both ends.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = (".safetensors", ".bin")
# Files that tokenizers are read from, by their beginnings or ends.
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "merges")
_TOKENIZER_FORMATS = (".model", ".tiktoken", ".spm", ".bpe", ".py")


def check(options: ModelOptions) -> None:
    """Check that the model's name means a folder with a whole model in it, or may be on the hub.

    Raises:
        UserError: When it does not.
    """
    from optuna_lora_rl import tiny

    name = options.name
    if name in gguf.PACKAGED and options.gguf_file is None:
        gguf.PACKAGED[name].path()
        return
    if name in tiny.MODELS:
        return
    path = Path(name).expanduser()
    if path.is_dir() and options.gguf_file is not None:
        if not (path / options.gguf_file).is_file():
            raise UserError(f"model.gguf_file: there is no file {str(path / options.gguf_file)!r}")
    elif path.is_dir():
        _check_folder(path, name)
    elif path.exists():
        raise UserError(f"model.name: {name!r} is a file; name the folder that holds the model")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: there is no folder {name!r}")
    else:
        check_hub_name(name, "model.name", "model")


def is_hub(options: ModelOptions) -> bool:
    """Whether the model has to be fetched from the hub: it is neither here nor in its cache."""
    from optuna_lora_rl import tiny

    built_in = options.name in tiny.MODELS or options.name in gguf.PACKAGED
    if built_in or Path(options.name).expanduser().is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    file = options.gguf_file or "config.json"
    cached = try_to_load_from_cache(options.name, file, revision=options.revision)
    return not isinstance(cached, str)


def check_hub_name(name: str, key: str, kind: str) -> None:
    """Check that the hub could have a model or data set of this name.

    Args:
        name: The name, which is none of a local file or folder.
        key: The option that says it, for the message.
        kind: ``"model"`` or ``"data set"``.

    Raises:
        UserError: When it could not.
    """
    if not _HUB_NAME.fullmatch(name) or name.endswith((".", "-")):
        raise UserError(
            f"{key}: {name!r} is no local file or folder, nor the name of a {kind} on the hub, "
            "such as owner/name"
        )


def _check_folder(folder: Path, name: str) -> None:
    files = {file.name for file in folder.iterdir() if file.is_file()}
    has_model = "config.json" in files
    if "adapter_config.json" in files:
        # transformers would load it into the model without a word, or another model in its place.
        raise UserError(
            f"model.name: the folder {name!r} holds "
            + ("an adapter beside a model" if has_model else "an adapter")
            + " (adapter_config.json); merge it first (optuna-lora-rl merge) and name the merged "
            + ("model, or move the adapter's files elsewhere" if has_model else "model")
        )
    if not has_model:
        raise UserError(f"model.name: the folder {name!r} holds no model (config.json)")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"model.name: the folder {name!r} has a config.json that cannot be read")
    if not any(file.endswith(_WEIGHTS) for file in files):
        raise UserError(f"model.name: the folder {name!r} holds no weights (.safetensors or .bin)")
    if not any(f.startswith(_TOKENIZERS) or f.endswith(_TOKENIZER_FORMATS) for f in files):
        raise UserError(f"model.name: the folder {name!r} holds no tokenizer (tokenizer.json)")
