"""What all runs of a study share: loaded, tokenised, priced and measured once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace
from functools import cached_property
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.finetuning import checking
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.cache import digest
from optuna_lora_rl.finetuning.cache import once
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.evaluation import Stage
from optuna_lora_rl.finetuning.evaluation import Stages
from optuna_lora_rl.finetuning.evaluation import Work
from optuna_lora_rl.finetuning.evaluation import drawn
from optuna_lora_rl.finetuning.evaluation import rows_read
from optuna_lora_rl.finetuning.evaluation import teacher_forced
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.preparation import Prepared
from optuna_lora_rl.finetuning.preparation import prepare
from optuna_lora_rl.finetuning.price import Price
from optuna_lora_rl.finetuning.products import cast_once
from optuna_lora_rl.finetuning.questions import Questions
from optuna_lora_rl.finetuning.questions import generated
from optuna_lora_rl.finetuning.ranks import Allocator
from optuna_lora_rl.vocabulary import Value


class Workspace:
    """Model, data, prices and the untuned model's evaluations.

    Each is made at its first use.

    Args:
        model: The base model.
        data: The examples.
        training: How every run trains.
        objective: What is maximised.
        target_sets: The user's own lists of module names, by name.
        typical: Parameters of a typical run, where they differ from the reference's.
        cache: Folder for what is made or measured once; None for nowhere.
        on_activity: Told what takes its time.
    """

    def __init__(
        self,
        model: ModelOptions,
        data: DataOptions,
        training: TrainingOptions,
        objective: ObjectiveOptions,
        target_sets: Mapping[str, Sequence[str]],
        typical: Mapping[str, Value],
        cache: Path | None,
        on_activity: OnActivity = unseen,
    ) -> None:
        self.data = data
        self._training = training
        self.objective = objective
        self.target_sets = target_sets
        self.cache = cache
        self._typical = {**objective.reference, **typical}
        self._model = model
        self._on_activity = on_activity

    @cached_property
    def prepared(self) -> Prepared:
        made = prepare(
            self._model,
            self.data,
            self._training,
            self.objective,
            cache=self.cache,
            on_activity=self._on_activity,
        )
        base = checking.checked(made.base, made.tokens, made.training, made.device, self.cache)
        return replace(made, base=base)

    @cached_property
    def training(self) -> TrainingOptions:
        return self.prepared.training

    @cached_property
    def price(self) -> Price:
        return Price(
            self.prepared,
            self._model.dtype,
            # Its arithmetic as it was asked for: what is counted is the same on every machine.
            self._training,
            self.objective,
            self.target_sets,
            self.allocator,
        )

    @cached_property
    def allocator(self) -> Allocator:
        tokens = self.prepared.tokens

        def facts() -> dict[str, Any]:
            # Of the whole training set, which takes its time.
            return {**self.facts(tokens.validation, None), "train": content_of(tokens.train)}

        return Allocator(
            self.prepared,
            self.training,
            Configuration.of(self.objective.reference),
            facts,
            self.cache,
        )

    @cached_property
    def baseline(self) -> Evaluation:
        """The untuned model's evaluation on the whole validation set."""
        return self.untuned(self.validation, self.prepared.asked)

    @cached_property
    def validation(self) -> Dataset:
        """What the last evaluation of a run reads."""
        return drawn(self.prepared.tokens.validation, self.rows_read[-1])

    @cached_property
    def work(self) -> Work:
        """What a typical run computes."""
        lengths = self.prepared.lengths
        wanted = Configuration.of(self._typical)
        plan = sft.Plan.of(wanted, self.training, len(lengths))
        read = [len(ids) for ids in self.prepared.tokens.validation["input_ids"]]
        trained = plan.steps * wanted.batch_size * sum(lengths) / len(lengths)
        return Work(trained, sum(read) / len(read))

    @cached_property
    def rows_read(self) -> list[int]:
        """How many examples each evaluation of a run reads."""
        first = self.training.first_evaluation
        if first == "auto" and self.training.rank_change.loss.source == "eval":
            # Their losses decide about ranks, and have to compare.
            first = 1.0
        return rows_read(
            self.training.evaluations,
            len(self.prepared.tokens.validation),
            self.work,
            first=first,
            reads_all=self.data.max_validation_samples != "auto",
        )

    @cached_property
    def stages(self) -> Stages:
        whole = Stage(self.validation, self.prepared.asked, self.baseline)
        return Stages(whole, self.rows_read, self.untuned)

    def untuned(self, dataset: Dataset, asked: Questions | None) -> Evaluation:
        """Returns the untuned model's evaluation, measured once."""

        def measure() -> dict[str, float]:
            return self.evaluate_base(dataset, asked, "measuring the untuned model")

        return Evaluation(**once(self.cache, "baselines", self.facts(dataset, asked), measure))

    def evaluate_base(
        self, dataset: Dataset, asked: Questions | None, what: str
    ) -> dict[str, float]:
        """Evaluates the untuned model."""
        base = self.prepared.base.model
        with own_randomness(), restored(base, {}), cast_once(base):
            return self.evaluate(base, dataset, asked, what)

    def evaluate(
        self,
        model: Any,
        dataset: Dataset,
        asked: Questions | None,
        what: str = "evaluating",
        *,
        on_activity: OnActivity | None = None,
    ) -> dict[str, float]:
        """Evaluates a model as it stands.

        Args:
            model: The model.
            dataset: What it reads.
            asked: What it answers, if anything.
            what: What this is, in words.
            on_activity: Told how far it is; the study's function by default.
        """
        prepared, tell = self.prepared, on_activity or self._on_activity
        with quiet():
            metrics = sft.evaluate(
                model,
                prepared.base.tokenizer,
                dataset,
                self.training,
                device=prepared.device,
                call=prepared.base.call,
                progress=partial(_tell, tell, what),
            )
            return {**teacher_forced(metrics), **self.generated(model, asked, tell)}

    def generated(
        self, model: Any, asked: Questions | None, on_activity: OnActivity
    ) -> dict[str, float]:
        """Returns the metrics of generated answers; none where nothing is asked."""
        if asked is None:
            return {}
        return generated(
            model,
            self.prepared.base.tokenizer,
            asked,
            max_new_tokens=self.objective.max_new_tokens,
            batch_size=self.training.eval_batch_size,
            on_activity=on_activity,
        )

    def facts(self, dataset: Dataset, asked: Questions | None) -> dict[str, Any]:
        """Returns all that an evaluation of the untuned model depends on."""
        prepared = self.prepared
        irrelevant = {"monitor", "report_to", "seed"}
        return {
            "loss": "cross-entropy, mean over tokens",
            "model": prepared.base.fingerprint,
            "device": prepared.device.type,
            "versions": [torch.__version__, transformers.__version__],
            "training": self.training.model_dump(mode="json", exclude=irrelevant),
            "validation": content_of(dataset),
            "asked": None if asked is None else [asdict(asked), self.objective.max_new_tokens],
        }

    def release(self) -> None:
        """Gives back what a run took and no other needs."""
        if self.prepared.device.type == "cuda":
            torch.cuda.empty_cache()


def _tell(on_activity: OnActivity, what: str, done: int, total: int) -> None:
    on_activity(Activity(what, done, total, "batches"))


def content_of(dataset: Dataset) -> str:
    """Returns a digest of a tokenised data set's content."""
    return digest(json.dumps([dataset["input_ids"][:], dataset["labels"][:]]))
