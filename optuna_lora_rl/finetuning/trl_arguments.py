"""What `training.extra` may hand on to TRL: what a trial sets itself is said elsewhere."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

# What a trial sets itself, and where the user says it instead.
_TUNED = {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "max_grad_norm": "max_grad_norm",
    "max_steps": "max_steps",
    "num_train_epochs": "num_train_epochs",
    "optim": "optim",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "warmup_ratio": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "weight_decay": "weight_decay",
}
_OPTIONS = {
    "activation_checkpointing": "training.gradient_checkpointing",
    "attn_implementation": "model.attn_implementation",
    "auto_find_batch_size": "training.micro_batch_size",
    "bf16": "training.precision",
    "bf16_full_eval": "training.precision",
    "fp16": "training.precision",
    "fp16_full_eval": "training.precision",
    "data_seed": "training.seed",
    "dataset_text_field": "data.columns",
    "eval_on_start": "training.evaluations, and the untuned model is measured in any case",
    "eval_steps": "training.evaluations",
    "eval_strategy": "training.evaluations",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "max_length": "data.max_length",
    "packing": "training.packing",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "report_to": "training.report_to",
    "seed": "training.seed",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": "training.use_cpu",
}
_OWN = (
    "accelerator_config",
    "dataset_kwargs",
    "debug",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "eval_packing",
    "load_best_model_at_end",
    "model_init_kwargs",
    "output_dir",
    "push_to_hub",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_strategy",
)
_SEVERAL_PROCESSES = ("ddp_backend", "deepspeed", "fsdp", "fsdp_config", "parallelism_config")
# These patch the modules themselves, which all trials share and each gives back as they were.
_PATCHES = ("liger_kernel_config", "use_liger_kernel")


def check_extra(extra: dict[str, Any]) -> None:
    """Raises ``ValueError`` for an argument that is not TRL's, or is said elsewhere."""
    # TRL takes seconds to import: only who passes arguments through pays for the check.
    from dataclasses import fields

    from trl import SFTConfig

    known = {field.name for field in fields(SFTConfig) if field.init}
    for name in extra:
        if name in _TUNED:
            raise ValueError(
                f"extra.{name} is set by each trial; fix it with {_TUNED[name]!r} in the space"
            )
        if name in _OPTIONS:
            raise ValueError(f"extra.{name} is said by {_OPTIONS[name]}")
        if name.startswith("hub_"):
            # A token among them would lie in the database for all to see.
            raise ValueError(f"extra.{name} has no use: nothing is pushed to the hub")
        if name in _OWN:
            raise ValueError(f"extra.{name} is kept by the study and cannot be changed")
        if name in _SEVERAL_PROCESSES:
            raise ValueError(
                f"extra.{name} is for training with several processes, and a trial has one; leave "
                "it out (gradient_checkpointing, micro_batch_size and model.dtype save memory)"
            )
        if name in _PATCHES:
            raise ValueError(
                f"extra.{name} would patch the base model for good, which all trials share; leave "
                "it out"
            )
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"extra.{name} is no argument of TRL's SFTConfig{hint}")
