"""Examples as token sequences: made once, by TRL's own preparation, and used by every trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl import SFTTrainer

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.data import Splits
from optuna_lora_rl.finetuning.data import fingerprint
from optuna_lora_rl.finetuning.data import turns
from optuna_lora_rl.finetuning.hub import first_line
from optuna_lora_rl.finetuning.kept import kept
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.model import Base
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.quiet import quiet
from optuna_lora_rl.finetuning.sources import Row

_COLUMNS = ("input_ids", "labels", "seq_lengths")
# What decides how rows become tokens.
_LIBRARIES = ("datasets", "tokenizers", "transformers", "trl")
# Of TRL's arguments: what changes the tokenizer too, which only preparing does.
_CHANGES_TOKENIZER = ("chat_template_path", "eos_token")


@dataclass(frozen=True)
class Tokens:
    """The tokenised splits.

    Attributes:
        train: Columns ``input_ids`` and ``labels`` (-100 where nothing is to be learnt).
        validation: The same, for evaluations.
        test: The same, for the final best, or None.
        unlearnable: How many examples were left out because cutting them to the longest length
            left nothing to learn.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    unlearnable: int

    @property
    def lengths(self) -> list[int]:
        """Lengths of the training sequences, in tokens."""
        return [len(ids) for ids in self.train["input_ids"]]


def tokenise(
    splits: Splits,
    base: Base,
    training: TrainingOptions,
    *,
    max_length: int,
    use_cpu: bool,
    cache: Path | None = None,
) -> Tokens:
    """Tokenises and cuts all splits.

    Prompt/completion examples are learnt in their completion only, others in every token, as TRL
    does; ``training.extra`` may say otherwise.

    Args:
        splits: The examples.
        base: Whose tokenizer it is.
        training: How every run trains.
        max_length: Longest sequence, in tokens.
        use_cpu: Whether runs are on the CPU.
        cache: Folder where tokens are kept by the content of the examples and all that decides
            what becomes of them; without it they are made in each process.

    Raises:
        UserError: When the tokenizer cannot render chat messages, nothing is left to learn, or
            the cache cannot be written.
    """
    datasets = {"train": splits.train, "validation": splits.validation}
    if splits.test:
        datasets["test"] = splits.test
    facts = {
        "rows": {name: fingerprint(rows) for name, rows in datasets.items()},
        "model": base.fingerprint,
        "chat_template": base.tokenizer.chat_template,
        "max_length": max_length,
        "packing": training.packing,
        "extra": _preparation(training.extra),
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    if any(name in training.extra for name in _CHANGES_TOKENIZER):
        cache = None

    def make() -> dict[str, Dataset]:
        try:
            return _prepare(datasets, base, training, max_length, use_cpu)
        except (TemplateError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(
                f"data.train: the {splits.kind} examples cannot be tokenised with the tokenizer "
                f"of {base.name!r}{_culprit(datasets, base.tokenizer)}: {first_line(error)}"
            ) from error

    prepared = kept(None if cache is None else cache / "tokens", facts, make)
    for name, dataset in prepared.items():
        if not len(dataset):
            raise UserError(
                f"data.max_length: within {max_length} tokens no {name} example has anything "
                "left to learn; the prompts alone fill it"
            )
    packed = training.packing
    unlearnable = sum(
        len(datasets[name]) - len(dataset)
        for name, dataset in prepared.items()
        if not (packed and name == "train")
    )
    return Tokens(
        train=prepared["train"],
        validation=prepared["validation"],
        test=prepared.get("test"),
        unlearnable=unlearnable,
    )


def _prepare(
    datasets: dict[str, list[Row]],
    base: Base,
    training: TrainingOptions,
    max_length: int,
    use_cpu: bool,
) -> dict[str, Dataset]:
    settings: dict[str, Any] = {
        "output_dir": "runs",
        "use_cpu": use_cpu,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": max_length,
        "packing": training.packing,
        "eval_packing": False,
        **_preparation(training.extra),
    }
    rows = {name: Dataset.from_list(list(split)) for name, split in datasets.items()}
    train = rows.pop("train")
    with quiet(), restored(base.model, {}):
        trainer = SFTTrainer(
            model=base.model,
            args=SFTConfig(**settings),
            train_dataset=train,
            eval_dataset=rows,
            processing_class=base.tokenizer,
        )
    prepared = {"train": trainer.train_dataset, **trainer.eval_dataset}
    return {name: _columns(dataset) for name, dataset in prepared.items()}


def _culprit(datasets: dict[str, list[Row]], tokenizer: PreTrainedTokenizerBase) -> str:
    # TRL says what a chat template refused, but not where.
    if tokenizer.chat_template is None:
        return ""
    for row in (row for split in datasets.values() for row in split if turns(row)):
        try:
            tools = None if row.get("tools") is None else json.loads(row["tools"])
            tokenizer.apply_chat_template(turns(row), tools=tools, tokenize=False)
        except Exception:
            start = " ".join(str(turns(row)[0]["content"]).split())[:60]
            return f", at the example that begins with {start!r}"
    return ""


def _preparation(extra: dict[str, Any]) -> dict[str, Any]:
    names = (
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_num_proc",
        "eos_token",
        "packing_strategy",
        "truncation_mode",
    )
    return {name: value for name, value in extra.items() if name in names}


def _columns(dataset: Dataset) -> Dataset:
    kept: Sequence[str] = [name for name in _COLUMNS if name in dataset.column_names]
    return dataset.select_columns(list(kept))
