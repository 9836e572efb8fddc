"""Where trials run, and in which arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optuna_lora_rl.finetuning.options import FLASH_ATTENTION
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import Precision
from optuna_lora_rl.finetuning.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Narrower models are no faster in bfloat16: studies/precision.py measured it, and wrote
# studies/results/precision.md.
_BF16_WIDTH = 384


def device_of(use_cpu: bool | None) -> torch.device:
    """Returns where trials run: the GPU, if there is one and it is wanted."""
    if not use_cpu and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def decided(training: TrainingOptions, model: PreTrainedModel) -> TrainingOptions:
    """Returns how runs train, with the arithmetic that ``precision: auto`` stands for."""
    if training.precision != "auto":
        return training
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    return training.model_copy(update={"precision": precision_of(model.device, width)})


def precision_of(device: torch.device, width: int) -> Precision:
    """Returns the faster arithmetic that is as good: ``fp32``, ``bf16`` or ``fp16``.

    Args:
        device: Where runs train.
        width: Of the model's hidden states.
    """
    if device.type == "cpu":
        return "bf16" if width >= _BF16_WIDTH and _has_bf16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def can(precision: str, device: torch.device) -> bool:
    """Whether a device trains in this arithmetic."""
    if precision == "bf16" and device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return precision != "fp16" or device.type == "cuda"


def described(precision: str, device: torch.device) -> str:
    """Returns device and arithmetic in words, such as ``CPU (AVX512), fp32``."""
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {precision}"


def _has_bf16() -> bool:
    """Whether the processor multiplies matrices of bfloat16, which others do in software."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def obstacle(model: ModelOptions, training: TrainingOptions) -> str | None:
    """Returns a sentence on why trials cannot run on this machine, or None."""
    device = device_of(training.use_cpu)
    if training.use_cpu is False and device.type == "cpu":
        reason = "this build of torch is for CPUs alone"
        if torch.version.cuda is not None:
            reason = "torch finds no NVIDIA GPU with a driver"
        return f"training.use_cpu is false, but {reason}; leave the key out to train on the CPU"
    if training.packing and model.attn_implementation not in FLASH_ATTENTION:
        return (
            "training.packing needs model.attn_implementation flash_attention_2: with any other "
            "kernel packed examples attend to each other"
        )
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        return (
            f"{torch.cuda.device_count()} GPUs are visible to one process, which TRL does not "
            "train on; set CUDA_VISIBLE_DEVICES to one of them and start a worker for each"
        )
    if device.type == "cpu" and (training.packing or training.precision == "fp16"):
        key = "packing" if training.packing else "precision fp16"
        return f"training.{key} needs a GPU, and there is none"
    return None
