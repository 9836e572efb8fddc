"""Fine-tuners over the random Llama, shared where a test leaves them as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions


@pytest.fixture(scope="session")
def make_tuner(random_llama: Path, sums: str) -> Callable[..., FineTuner]:
    """Makes a fine-tuner; keyword arguments are options, found by their names."""

    def make(cache: Path | None = None, target_sets: Any = None, **options: Any) -> FineTuner:
        sections: dict[str, dict[str, Any]] = {
            "model": {"name": str(random_llama)},
            "data": {"train": sums, "max_length": 16},
            "training": {"use_cpu": True, "evaluations": 2},
            "objective": {},
        }
        kinds = (ModelOptions, DataOptions, TrainingOptions, ObjectiveOptions)
        for name, value in options.items():
            for section, kind in zip(sections, kinds, strict=True):
                if name in kind.model_fields:
                    sections[section][name] = value
        return FineTuner(
            *(kind(**sections[name]) for name, kind in zip(sections, kinds, strict=True)),
            target_sets=target_sets,
            cache=cache,
        )

    return make


@pytest.fixture(scope="session")
def tuner(make_tuner: Callable[..., FineTuner]) -> FineTuner:
    """A prepared fine-tuner on sums, scored by loss."""
    tuner = make_tuner()
    tuner.prepare()
    tuner.baseline()
    return tuner


@pytest.fixture(scope="session")
def base_hash() -> Callable[[FineTuner], str]:
    """Hashes names and bytes of all the base model's tensors."""

    def hashed(tuner: FineTuner) -> str:
        digest = hashlib.sha256()
        for name, tensor in tuner.prepared.base.model.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    return hashed
