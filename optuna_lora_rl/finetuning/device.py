"""Where trials run, and in which arithmetic."""

from __future__ import annotations

import torch

from optuna_lora_rl.finetuning.options import FLASH_ATTENTION
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import TrainingOptions


def device_of(use_cpu: bool | None) -> torch.device:
    """Returns where trials run: the GPU, if there is one and it is wanted."""
    if not use_cpu and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def precision_of(training: TrainingOptions, device: torch.device) -> str:
    """Returns the arithmetic of training: ``fp32``, ``bf16`` or ``fp16``."""
    if training.precision != "auto":
        return training.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def described(training: TrainingOptions) -> str:
    """Returns device and arithmetic in words, such as ``CPU (AVX512), fp32``."""
    device = device_of(training.use_cpu)
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {precision_of(training, device)}"


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
