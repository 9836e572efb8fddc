"""What all trials of a study share: the loaded model and the tokenised data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning import device as devices
from optuna_lora_rl.finetuning import model
from optuna_lora_rl.finetuning import questions as asking
from optuna_lora_rl.finetuning import tokens
from optuna_lora_rl.finetuning.data import Splits
from optuna_lora_rl.finetuning.files import Row
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.model import Base
from optuna_lora_rl.finetuning.options import GENERATED_METRICS
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.questions import Questions
from optuna_lora_rl.finetuning.tokens import Tokens


@dataclass(frozen=True)
class Prepared:
    """Model and data, ready for trials.

    Attributes:
        base: The base model.
        splits: The examples.
        tokens: The same, tokenised.
        lengths: Lengths of the training sequences, in tokens.
        asked: Questions of the validation set, where the metric compares answers.
        device: Where trials run.
        training: How every run trains, its arithmetic decided.
    """

    base: Base
    splits: Splits
    tokens: Tokens
    lengths: list[int]
    asked: Questions | None
    device: torch.device
    training: TrainingOptions


def prepare(
    model_options: ModelOptions,
    data_options: DataOptions,
    training: TrainingOptions,
    objective: ObjectiveOptions,
    *,
    cache: Path | None = None,
    on_activity: OnActivity = unseen,
) -> Prepared:
    """Loads model and data; the data first, because its mistakes show sooner.

    Args:
        model_options: The base model.
        data_options: The examples.
        training: How every run trains.
        objective: What is maximised.
        cache: Folder where tokens are kept.
        on_activity: Told what is loaded, fetched and tokenised, and how far that is.

    Raises:
        UserError: When either cannot be had, they do not fit the options, or the cache cannot be
            written.
    """
    refused = devices.obstacle(model_options, training)
    if refused:
        raise UserError(refused)
    device = devices.device_of(training.use_cpu)
    with quiet(on_activity), own_randomness():
        on_activity(Activity(f"loading {data_options.train}"))
        splits = data.load(data_options)
        data.check_metric(splits.kind, objective)
        on_activity(Activity(f"loading {model_options.name}"))
        base = model.load(model_options, device)
        on_activity(Activity("tokenising"))
        made = tokens.tokenise(
            splits,
            base,
            training,
            max_length=longest(base, data_options),
            use_cpu=device.type == "cpu",
            cache=cache,
        )
        asked = questions(base, splits.validation, data_options, objective)
    training = devices.decided(training, base.model)
    return Prepared(base, splits, made, made.lengths, asked, device, training)


def questions(
    base: Base, rows: Sequence[Row], data_options: DataOptions, objective: ObjectiveOptions
) -> Questions | None:
    """Draws the questions of a generated metric, or returns None where the metric has none."""
    if objective.metric not in GENERATED_METRICS:
        return None
    length = longest(base, data_options)
    room = length - objective.max_new_tokens
    if room < 1:
        raise UserError(
            f"objective.max_new_tokens is {objective.max_new_tokens}, which leaves no room for a "
            f"prompt within {length} tokens"
        )
    return asking.questions(
        rows,
        base.tokenizer,
        count=objective.generation_samples,
        seed=data_options.seed,
        longest_prompt=room,
    )


def longest(base: Base, data_options: DataOptions) -> int:
    """Returns the longest sequence: what was asked for, or all positions that the model has."""
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return min(data_options.max_length, positions or data_options.max_length)
