"""The network's weights on disk: safetensors with a version and the hash of the feature layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import save_file

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.features import LAYOUT_HASH
from optuna_lora_rl.policy.features import WIDE_HASH
from optuna_lora_rl.policy.network import Scorer

VERSION = "1"
SHIPPED = Path(__file__).parent / "weights.safetensors"


def save(network: Scorer, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the weights; ``notes`` (command, seed, date) travel with them as metadata."""
    features = WIDE_HASH if network.wide else LAYOUT_HASH
    metadata = {"version": VERSION, "features": features, "width": str(network.width)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, str(path), metadata={**(notes or {}), **metadata})


def load(path: Path | str | None = None) -> Scorer:
    """Read weights into a network, ready to use; by default those shipped with the package.

    Raises:
        UserError: no such file, not a safetensors file of this package, or made for another
            version or another feature layout.
    """
    file = SHIPPED if path is None else Path(path)
    if not file.is_file():
        raise UserError(f"weights: there is no file {file}")
    try:
        with safe_open(str(file), framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {file} is not a readable safetensors file ({error})") from error
    for key, expected in (("version", (VERSION,)), ("features", (LAYOUT_HASH, WIDE_HASH))):
        if metadata.get(key) not in expected:
            raise UserError(
                f"weights: {file} has {key} {metadata.get(key)!r}, but this version of"
                f" optuna_lora_rl reads {' or '.join(map(repr, expected))}; train the policy again"
            )
    try:
        # Layers draw their start from the global state, with the default device and type.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            wide = metadata["features"] == WIDE_HASH
            network = Scorer(width=int(metadata["width"]), wide=wide).float()
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"weights: {file} does not hold a policy network ({error})") from error
    return network.eval().requires_grad_(False)
