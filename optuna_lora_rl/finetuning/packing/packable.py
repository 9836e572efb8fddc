"""What can share a forward pass with others, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.options import TrainingOptions

_ROWS, _LENGTH = 2, 3
# Arguments of SFTConfig that change the model or the course of a step.
_OWN_COURSE = (
    "activation_offloading",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "padding_free",
    "torch_compile",
)
_FUSED_OPTIMIZERS = ("lomo", "adalomo", "layerwise")


@dataclass(frozen=True)
class Probed:
    """What a small forward pass shows of a model.

    Attributes:
        modules: Linear modules that see every token of every sequence, once and in order.
        obstacle: Why nothing can be packed with this model, or None.
    """

    modules: frozenset[str]
    obstacle: str | None


def probe(model: PreTrainedModel, linears: Iterable[LinearModule]) -> Probed:
    """Looks at the shapes that pass through a model, and whether it draws random numbers."""
    calls: dict[str, list[tuple[int, ...]]] = {}

    def seen(name: str, module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        calls.setdefault(name, []).append(tuple(args[0].shape) if args else ())

    handles = [
        model.get_submodule(m.name).register_forward_hook(partial(seen, m.name)) for m in linears
    ]
    ids = torch.ones((_ROWS, _LENGTH), dtype=torch.long, device=model.device)
    numbers = _random_states(ids.device)
    model.train()
    try:
        with torch.no_grad():
            backbone = model.base_model
            out = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hidden = getattr(out, "last_hidden_state", None)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    if backbone is model or hidden is None or hidden.shape[:2] != (_ROWS, _LENGTH):
        return Probed(frozenset(), f"a {model.config.model_type} model has no backbone to share")
    if not torch.equal(numbers, _random_states(ids.device)):
        return Probed(frozenset(), "the base model has dropout of its own")
    fitting = {m.name for m in linears if calls.get(m.name) == [(_ROWS, _LENGTH, m.inputs)]}
    return Probed(frozenset(fitting), None)


def obstacle(
    configuration: Configuration,
    chosen: Iterable[LinearModule],
    probed: Probed,
    training: TrainingOptions,
) -> str | None:
    """Returns why a configuration must run alone, or None."""
    if probed.obstacle is not None:
        return probed.obstacle
    if training.report_to:
        return "trackers follow one run at a time (training.report_to)"
    if training.packing:
        return "training.packing lays examples out in its own way"
    for name in _OWN_COURSE:
        if training.extra.get(name):
            return f"training.extra.{name} changes the model or the course of a step"
    if configuration.use_dora:
        return "use_dora normalises by the whole adapted weight"
    if configuration.rank_change != "none":
        return f"rank_change {configuration.rank_change} changes the adapter's shapes in training"
    if configuration.truncates:
        return "truncate changes the ranks, and reads the validation set once more"
    if configuration.bias != "none":
        return f"bias {configuration.bias} trains the base model's own biases"
    if any(part in configuration.optim for part in _FUSED_OPTIMIZERS):
        return f"optim {configuration.optim} updates the weights in the backward pass"
    for module in chosen:
        if module.name not in probed.modules:
            return f"{module.name} does not see every token of every sequence once"
    return None


def _random_states(device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
