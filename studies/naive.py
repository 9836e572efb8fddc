"""A LoRA study as one writes it today with Optuna, TRL and PEFT: the benchmarks' naive arm.

Nothing here is of the package. Each trial loads the model and the tokenizer anew and hands them
to a new ``SFTTrainer``, which prepares the data, as in the libraries' own examples. Where a user
may do better or worse, this one does better: the data files are read once, so that ``datasets``
finds the tokenised columns of the first trial in its cache; gradient checkpointing is off on
small models; the evaluation batch is as large as the package's; nothing is saved. With
``defaults`` gradient checkpointing (on) and the evaluation batch (8) are left as TRL has them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from datasets import Dataset
from datasets import DatasetDict
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import TrainerCallback
from transformers import set_seed
from trl import SFTConfig
from trl import SFTTrainer

# Names of the modules in Llama, Qwen, Mistral, Gemma and their like.
TARGETS: dict[str, str | list[str]] = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all-linear": "all-linear",
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trials share.

    Attributes:
        model: Folder or hub name of the model.
        evaluations: How often a trial is evaluated; divides its steps.
        seed: Of initialisation, dropout and the order of the examples.
        on_gpu: Whether to train on the GPU, in bfloat16.
        max_length: Longest sequence, in tokens.
        eval_batch_size: Sequences in one evaluation pass.
        folder: Where the trainer may write; it writes nothing.
        defaults: Whether gradient checkpointing and the evaluation batch are TRL's own.
        bf16: Whether to train in mixed bfloat16 on a CPU too.
    """

    model: str
    evaluations: int
    seed: int
    on_gpu: bool
    max_length: int = 512
    eval_batch_size: int = 32
    folder: str = "runs"
    defaults: bool = False
    bf16: bool = False


def read(train: Path, validation: Path, cache: Path) -> DatasetDict:
    """Read the data, once for all trials.

    Not by ``load_dataset("json")``, which takes answers such as 2045-07-07 for points in time.
    """
    for name, file in (("train", train), ("validation", validation)):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        Dataset.from_list(rows).save_to_disk(cache / name)
    return DatasetDict({name: load_from_disk(cache / name) for name in ("train", "validation")})


def suggest(trial: optuna.Trial, steps: int) -> dict[str, Any]:
    """Ask for a trial's parameters: the space of ``studies/quickstart.yaml``."""
    rank = trial.suggest_int("lora_rank", 2, 64, log=True)
    ratio = trial.suggest_float("lora_alpha_ratio", 0.5, 8, log=True)
    return {
        "lora_rank": rank,
        "lora_alpha": ratio * rank,
        "lora_dropout": trial.suggest_float("lora_dropout", 0.0, 0.3),
        "target_modules": trial.suggest_categorical("target_modules", list(TARGETS)),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [4, 8, 16]),
        "max_steps": steps,
    }


def train(
    configuration: Mapping[str, Any],
    setup: Setup,
    data: DatasetDict,
    report: Callable[[int, float], None],
) -> float:
    """Fine-tune once and return the last validation loss.

    Args:
        configuration: The parameters, as ``suggest`` gives them.
        setup: What all trials share.
        data: The splits ``train`` and ``validation``.
        report: Called at each evaluation with the step and the validation loss; it may raise
            ``optuna.TrialPruned``.
    """
    dtype = torch.bfloat16 if setup.on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    set_seed(setup.seed)
    reports = _Reports(report)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(configuration, setup),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=configuration["lora_rank"],
            lora_alpha=configuration["lora_alpha"],
            lora_dropout=configuration["lora_dropout"],
            target_modules=TARGETS[configuration["target_modules"]],
        ),
        callbacks=[reports],
    )
    try:
        trainer.train()
    finally:
        del model, trainer
        if setup.on_gpu:
            # The usual remedy for trials that run out of memory.
            gc.collect()
            torch.cuda.empty_cache()
    return reports.loss


def _arguments(configuration: Mapping[str, Any], setup: Setup) -> SFTConfig:
    careful: dict[str, Any] = {
        "gradient_checkpointing": False,
        "per_device_eval_batch_size": setup.eval_batch_size,
    }
    return SFTConfig(
        **({} if setup.defaults else careful),
        output_dir=setup.folder,
        use_cpu=not setup.on_gpu,
        bf16=setup.on_gpu or setup.bf16,
        max_steps=configuration["max_steps"],
        per_device_train_batch_size=configuration["batch_size"],
        learning_rate=configuration["learning_rate"],
        eval_strategy="steps",
        eval_steps=max(1, configuration["max_steps"] // setup.evaluations),
        max_length=setup.max_length,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=setup.on_gpu,
        seed=setup.seed,
    )


class _Reports(TrainerCallback):
    def __init__(self, report: Callable[[int, float], None]) -> None:
        self.loss = float("nan")
        self._report = report

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.loss = metrics["eval_loss"]
        self._report(state.global_step, self.loss)
