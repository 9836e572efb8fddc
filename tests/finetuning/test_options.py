from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic import ValidationError

from optuna_lora_rl.finetuning.options import CostWeights
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions

SECTIONS = (ModelOptions, DataOptions, TrainingOptions, CostWeights, ObjectiveOptions)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_is_described_with_a_valid_example(section: type[BaseModel]) -> None:
    needed = {"train": "data.jsonl"} if section is DataOptions else {}
    for name, field in section.model_fields.items():
        assert field.description and field.description.endswith("."), name
        assert field.examples, name
        for example in field.examples:
            section(**{**needed, name: example})


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (TrainingOptions, {"use_cpu": True, "precision": "fp16"}, "fp16 needs a GPU"),
        (TrainingOptions, {"use_cpu": True, "packing": True}, "packing needs a GPU"),
        (TrainingOptions, {"evaluations": 0}, "evaluations"),
        (TrainingOptions, {"seed": 2**32}, "less than or equal to 4294967295"),
        (TrainingOptions, {"report_to": ["neptune"]}, "report_to"),
        (TrainingOptions, {"extra": {"bf16": True}}, "said by training.precision"),
        (TrainingOptions, {"extra": {"eval_on_start": True}}, "untuned model is measured"),
        (TrainingOptions, {"extra": {"learning_rate": 1}}, "'learning_rate' in the space"),
        (TrainingOptions, {"extra": {"output_dir": "x"}}, "kept by the study"),
        (TrainingOptions, {"extra": {"neftune_noise_alpa": 5}}, "'neftune_noise_alpha'"),
        (TrainingOptions, {"extra": {"deepspeed": "zero.json"}}, "deepspeed is for training with"),
        (TrainingOptions, {"extra": {"fsdp": "full_shard"}}, "fsdp is for training with several"),
        (TrainingOptions, {"extra": {"use_liger_kernel": True}}, "patch the base model for good"),
        (TrainingOptions, {"extra": {"bf16_full_eval": True}}, "said by training.precision"),
        (TrainingOptions, {"extra": {"auto_find_batch_size": True}}, "training.micro_batch_size"),
        (TrainingOptions, {"extra": {"accelerator_config": {}}}, "kept by the study"),
        (DataOptions, {"train": "a.csv", "columns": {"question": "q"}}, "no role of a column"),
        (DataOptions, {"train": "org/set", "validation_split": "train"}, "trained on"),
        (DataOptions, {"train": "a.csv", "validation_fraction": 1.0}, "less than 1"),
        (DataOptions, {"train": "a.csv", "max_lenght": 4}, "max_lenght"),
        (ObjectiveOptions, {"objectives": ["cost"]}, "[score] or [quality, cost]"),
        (ObjectiveOptions, {"cost": {"time": 0, "memory": 0, "parameters": 0}}, "all 0"),
        (ObjectiveOptions, {"metric": "bleu"}, "exact_match"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    section: type[BaseModel], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        section(**values)
    assert words in str(refused.value)


def test_arguments_that_sftconfig_knows_pass_through() -> None:
    assert TrainingOptions(extra={"neftune_noise_alpha": 5}).extra == {"neftune_noise_alpha": 5}


def test_options_load_no_heavy_library() -> None:
    code = (
        "import sys; import optuna_lora_rl.finetuning.options;"
        "import optuna_lora_rl.finetuning.finetuner;"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'optuna')"
        " if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
