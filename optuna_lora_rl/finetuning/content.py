"""Digests of what is read of a model's folder: any other file may come and go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import BinaryIO

# What transformers reads by name: configurations, and what a tokenizer is made of.
_NAMES = {
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "encoder.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"),
    *("normalizer.json", "byte_maps.json", "emoji.json", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json", "chat_template.json"),
}
_SUFFIXES = {".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".jinja"}
# What else code of the model's own may read.
_SUFFIXES_WITH_CODE = {*_SUFFIXES, ".json", ".txt", ".py"}
_TEMPLATES = "additional_chat_templates"
# The first of them that is there holds the weights, or says which files do.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def of_model(folder: Path) -> str:
    """A digest of what is read of a local model: small files whole, weights in samples."""
    digest = hashlib.blake2b(digest_size=16)
    for file in _small_files(folder):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    for file in _weights(folder):
        digest.update(file.relative_to(folder).as_posix().encode() + _sample(file))
    return digest.hexdigest()


def _small_files(folder: Path) -> list[Path]:
    suffixes = _SUFFIXES_WITH_CODE if _brings_code(folder) else _SUFFIXES
    files = [
        file
        for file in (*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja"))
        if file.name in _NAMES or file.suffix in suffixes
    ]
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _brings_code(folder: Path) -> bool:
    return any(
        '"auto_map"' in (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in ("config.json", "tokenizer_config.json")
        if (folder / name).is_file()
    )


def _weights(folder: Path) -> Iterator[Path]:
    """The files of the weights, in transformers' order of preference, and of an adapter beside."""
    for names in ((*_WEIGHTS, *_OLD_WEIGHTS), _ADAPTERS):
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            continue
        yield found
        if found.suffix == ".json":
            shards = {folder / name for name in _shards(found)}
            yield from sorted(shard for shard in shards if shard.is_file())


def _shards(index: Path) -> list[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return [str(name) for name in content["weight_map"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        # Said in a sentence where the model is loaded.
        return []


def _sample(file: Path, count: int = 1 << 12, length: int = 1 << 11) -> bytes:
    # Weights of many gigabytes are told apart by size and blocks: the first of each tensor, since
    # training, also of an adapter merged later, changes whole tensors, and some in between.
    size = file.stat().st_size
    with file.open("rb") as content:
        starts = {size * i // count for i in range(count)}
        if file.suffix == ".safetensors":
            starts |= _tensor_starts(content, size)
        blocks = [f"{size}".encode()]
        for start in sorted(starts):
            content.seek(start)
            blocks.append(content.read(length))
        return b"".join(blocks)


def _tensor_starts(content: BinaryIO, size: int) -> set[int]:
    # The format: the header's length in 8 bytes, the header in JSON, then the tensors.
    length = int.from_bytes(content.read(8), "little")
    if length > size:
        # Another file's place-holder, such as git leaves of what it did not fetch.
        return set()
    try:
        header = json.loads(content.read(length))
        return {
            8 + length + int(entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        # Damaged, which is said where the model is loaded.
        return set()
