"""One supervised fine-tuning run with TRL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase
from transformers import PrinterCallback
from transformers import TrainerCallback
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig
from trl import SFTTrainer

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import heads
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.model_call import PLAIN
from optuna_lora_rl.finetuning.model_call import ModelCall
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.trackers import Follower
from optuna_lora_rl.finetuning.trainer import Batches
from optuna_lora_rl.finetuning.trainer import Evaluations
from optuna_lora_rl.finetuning.trainer import OnEvaluation
from optuna_lora_rl.finetuning.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """How a configuration's batch and length become TRL's.

    Attributes:
        steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the data.
        micro_batch_size: Sequences in one forward pass.
        accumulation: Forward passes in one step.
        evaluated: The steps after which the validation set is read, and the number of each such
            evaluation among ``training.evaluations``. A run of fewer steps leaves some out, so
            that equal numbers stand for equal shares of the training, and the last is the last.
    """

    steps: int
    steps_per_epoch: int
    micro_batch_size: int
    accumulation: int
    evaluated: dict[int, int]

    @classmethod
    def of(cls, configuration: Configuration, options: TrainingOptions, examples: int) -> Plan:
        batch = configuration.batch_size
        most = min(options.micro_batch_size or batch, batch)
        # The largest divisor: every step sees exactly batch_size sequences.
        micro = max(size for size in range(1, most + 1) if batch % size == 0)
        accumulation = batch // micro
        per_epoch = math.ceil(math.ceil(examples / micro) / accumulation)
        steps = configuration.max_steps or math.ceil(configuration.num_train_epochs * per_epoch)
        count = min(options.evaluations, steps)
        return cls(
            steps=steps,
            steps_per_epoch=per_epoch,
            micro_batch_size=micro,
            accumulation=accumulation,
            evaluated={
                round(steps * i / count): round(options.evaluations * i / count)
                for i in range(1, count + 1)
            },
        )


def check(configuration: Configuration, options: TrainingOptions) -> None:
    """Checks the names of optimizer and schedule, before anything is made.

    Raises:
        FineTuningError: With reason ``"configuration"``, when transformers has no such optimizer
            or schedule, or the schedule wants arguments that it is not given.
    """
    for name, kind in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        value = getattr(configuration, name)
        allowed = [member.value for member in kind if member.value != "reduce_lr_on_plateau"]
        if value not in allowed:
            raise FineTuningError(
                "configuration", f"{name} {value!r} is unknown; it is one of {', '.join(allowed)}"
            )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    given = options.extra.get("lr_scheduler_kwargs") or {}
    try:
        get_scheduler(
            configuration.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=json.loads(given) if isinstance(given, str) else dict(given),
        )
    except (ValueError, TypeError) as error:
        raise FineTuningError(
            "configuration",
            f"lr_scheduler_type {configuration.lr_scheduler_type} needs other "
            f"training.extra.lr_scheduler_kwargs: {first_line(error)}",
        ) from error


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    validation: Mapping[int, Dataset],
    configuration: Configuration,
    plan: Plan,
    options: TrainingOptions,
    *,
    device: torch.device,
    seed: int,
    folder: Path,
    run_name: str | None,
    on_evaluation: OnEvaluation,
    after_backward: Callable[[], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    log_every: int | None = None,
    merges: bool = False,
    follower: Follower | None = None,
    call: ModelCall = PLAIN,
    on_activity: OnActivity = unseen,
) -> int:
    """Trains the adapter in ``model`` and returns the steps done.

    Args:
        model: Base model with the adapter in it.
        tokenizer: For padding.
        dataset: Tokenised training set.
        validation: What is read after each step that is followed by an evaluation.
        configuration: The trial's parameters.
        plan: Steps and batches that follow from it.
        options: What all trials share.
        device: Where to train.
        seed: Of the order of examples and of dropout.
        folder: Where trackers may write.
        run_name: The trial's name in trackers.
        on_evaluation: Called after each evaluation; what it raises reaches the caller after the
            trackers were closed.
        after_backward: Called in each step between the backward pass and the optimizer.
        callbacks: Further callbacks of the trainer.
        log_every: Steps from one training loss for the callbacks to the next.
        merges: Whether evaluations may add the updates to the base weights for their time.
        follower: Knows the trackers that follow the run; None for none.
        call: How the model is called.
        on_activity: Told of each step, and of each batch that is evaluated.

    Raises:
        FineTuningError: When the loss is no finite number, or TRL refuses the configuration.
    """
    callback = Evaluations(plan.evaluated, on_evaluation, on_activity)
    trackers = follower.names if follower else []
    settings = {
        "output_dir": str(folder),
        "run_name": run_name,
        "seed": seed,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": configuration.learning_rate,
        "lr_scheduler_type": configuration.lr_scheduler_type,
        "warmup_steps": _warmup(configuration, plan),
        "optim": configuration.optim,
        "weight_decay": configuration.weight_decay,
        "max_grad_norm": configuration.max_grad_norm,
        "gradient_checkpointing": options.gradient_checkpointing,
        # Training loss goes to trackers only; each log costs a synchronisation.
        "logging_steps": 10 if trackers else 10**9,
        **_shared(options, device),
        **({} if log_every is None else _logging(log_every)),
    }
    if trackers:
        settings["report_to"] = trackers
    try:
        datasets = (dataset, validation[plan.steps])
        trainer = _trainer(model, tokenizer, datasets, settings, [callback, *callbacks], call=call)
        trainer.stages = validation
        trainer.evaluations = callback
        trainer.optimizer = _optimizer(trainer, model, configuration)
        trainer.after_backward = after_backward
        trainer.merges = merges and not (trainer.args.bf16 or trainer.args.fp16)
    except (ValueError, TypeError, ImportError) as error:
        raise FineTuningError("configuration", first_line(error)) from error
    if configuration.rank_change == "none":
        _spare_walks(model)
    if follower:
        follower.joins(trainer)
    with _closing(trainer, bool(trackers)):
        trainer.train()
    if callback.raised is not None:
        raise callback.raised
    return int(trainer.state.global_step)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    options: TrainingOptions,
    *,
    device: torch.device,
    progress: Callable[[int, int], None],
    call: ModelCall = PLAIN,
) -> dict[str, float]:
    """Returns TRL's evaluation metrics of a model as it stands.

    Args:
        model: The model.
        tokenizer: For padding.
        dataset: Tokenised examples.
        options: What all trials share.
        device: Where to evaluate.
        progress: Told after each batch how many are done, and how many there are.
        call: How the model is called.
    """
    trainer = _evaluator(model, tokenizer, dataset, options, device, call)
    trainer.add_callback(Batches(progress))
    with quiet():
        metrics: dict[str, float] = trainer.evaluate()
    return metrics


def losses_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    options: TrainingOptions,
    *,
    device: torch.device,
    call: ModelCall = PLAIN,
) -> Tensor:
    """Returns the losses of the learnt tokens of all rows, in one batch, with their graph."""
    together = options.model_copy(update={"eval_batch_size": len(dataset)})
    trainer = _evaluator(model, tokenizer, dataset, together, device, call)
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with quiet(), trainer.learnt(batch) as selected:
        found = trainer.model(**selected, fused_lm_head=True)
    losses: Tensor = -found.log_probs[found.label_mask].float()
    return losses


def _spare_walks(model: PeftModel) -> None:
    """Remembers what a trainer would walk all modules for, three times in every step."""
    # The base comes as it evaluates: without its dropout, and with nothing computed again.
    model.train()
    parameters, train = list(model.parameters()), model.train

    def switch(mode: bool = True) -> nn.Module:
        return train(mode) if mode != model.training else model

    model.parameters = lambda recurse=True: iter(parameters)
    model.train = switch


def _evaluator(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    options: TrainingOptions,
    device: torch.device,
    call: ModelCall,
) -> Trainer:
    settings = {
        "output_dir": "runs",
        "gradient_checkpointing": False,
        **_shared(options, device),
    }
    try:
        return _trainer(model, tokenizer, (dataset, dataset), settings, [], call=call)
    except FineTuningError as error:
        if not options.extra:
            raise
        raise UserError(f"training.extra: {error.message}") from error


def _trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: tuple[Dataset, Dataset],
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
    *,
    call: ModelCall,
) -> Trainer:
    try:
        with quiet():
            trainer = Trainer(
                model=model,
                args=SFTConfig(**settings),
                train_dataset=datasets[0],
                eval_dataset=datasets[1],
                processing_class=tokenizer,
                callbacks=callbacks,
            )
    except (ValueError, TypeError, ImportError) as error:
        raise FineTuningError("configuration", first_line(error)) from error
    trainer.remove_callback(PrinterCallback)
    trainer.call = call
    if call.own_head or call.few:
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        heads.use_own(whole, None if call.own_head else heads.FEW)
    return trainer


def _shared(options: TrainingOptions, device: torch.device) -> dict[str, Any]:
    on_cpu = device.type == "cpu"
    return {
        "use_cpu": on_cpu,
        "bf16": options.precision == "bf16",
        "fp16": options.precision == "fp16",
        "per_device_eval_batch_size": options.eval_batch_size,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": not on_cpu,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": options.packing,
        "eval_packing": False,
        # A router's balance is no part of the text's loss. TRL adds it by the model's own
        # coefficient, and finds what it needs for it in some architectures only.
        "router_aux_loss_coef": 0.0,
        **options.extra,
    }


def _logging(every: int) -> dict[str, Any]:
    # A callback reads the losses, whatever else the user wants logged.
    return {"logging_strategy": "steps", "logging_steps": every, "logging_first_step": False}


def _warmup(configuration: Configuration, plan: Plan) -> int:
    # In whole steps: transformers reads 1.0 as one step, not as all of them.
    return math.ceil(configuration.warmup_ratio * plan.steps)


def _optimizer(
    trainer: SFTTrainer, model: nn.Module, configuration: Configuration
) -> torch.optim.Optimizer | None:
    # Asked for in any case: an optimizer that is not installed shall show before training starts.
    kind, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    if configuration.loraplus_lr_ratio == 1:
        return None
    rate = arguments.pop("lr")
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=configuration.loraplus_lr_ratio,
        loraplus_weight_decay=configuration.weight_decay,
        **arguments,
    )
    return optimizer


@contextmanager
def _closing(trainer: SFTTrainer, is_followed: bool) -> Iterator[None]:
    finished = False
    try:
        with quiet():
            yield
        finished = True
    finally:
        if is_followed and not finished:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
