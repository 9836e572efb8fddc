"""The fine-tuner of a study, and what its trials will take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.rank import tables
from optuna_lora_rl.study import data_report
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.forecast import Forecast
    from optuna_lora_rl.finetuning.options import TrainingOptions
    from optuna_lora_rl.study.spec import Budget
    from optuna_lora_rl.study.spec import StudySpec


def make(
    spec: StudySpec,
    *,
    training: TrainingOptions | None = None,
    cache: Path | None = None,
    on_activity: OnActivity = unseen,
) -> FineTuner:
    """Returns the fine-tuner of a study's trials; nothing is loaded yet.

    Args:
        spec: The study.
        training: How trials train, where it is not as the file says.
        cache: Folder for what is made once; None for nowhere.
        on_activity: Told what takes its time.
    """
    # Takes seconds: transformers, TRL and PEFT come with it.
    from optuna_lora_rl.finetuning.finetuner import FineTuner

    return FineTuner(
        spec.model,
        spec.data,
        training or spec.training,
        spec.objective,
        target_sets=spec.target_sets,
        typical=spec.lora_space().middle(),
        cache=cache,
        on_activity=on_activity,
    )


def context(spec: StudySpec, tuner: FineTuner) -> TuningContext:
    """What is known of model, data and run before the first trial, for the sampler."""
    traits, space = tuner.traits(), spec.lora_space()
    tuned, usual = space.distributions(), space.middle()
    batch = None if "batch_size" in tuned else int(usual["batch_size"])
    steps = None
    if not tuned.keys() & {"max_steps", "num_train_epochs"}:
        steps = max(int(usual["max_steps"]), 0)
        if not steps and batch is not None:
            epochs = float(usual["num_train_epochs"])
            steps = max(round(epochs * traits["train_examples"] / batch), 1)
    return TuningContext(
        hidden_size=int(traits["hidden_size"]),
        layers=int(traits["model_layers"]),
        parameters=int(traits["model_parameters"]),
        examples=int(traits["train_examples"]),
        tokens=float(traits["mean_tokens"]),
        steps=steps or None,
        batch_size=batch,
        method="sft",
    )


def prepare(tuner: FineTuner, spec: StudySpec) -> list[str]:
    """Loads and checks, and returns what is worth knowing about the model, in sentences."""
    space = spec.lora_space()
    targets, layers = space.values("target_modules"), space.values("layers")
    return tuner.prepare(map(str, targets), map(str, layers))


def measured(spec: StudySpec, on_activity: OnActivity) -> list[str]:
    """Loads model and data, times two steps, and returns what was found in sentences.

    Raises:
        UserError: When model or data cannot be used, or a typical trial fails.
    """
    from optuna_lora_rl.finetuning import device

    tuner = make(spec, on_activity=on_activity)
    notes = prepare(tuner, spec)
    facts = tuner.data_facts()
    try:
        found = tuner.forecast()
    except FineTuningError as error:
        raise UserError(f"a trial in the middle of the space fails: {error.message}") from error
    where = device.described(tuner.precision, device.device_of(spec.training.use_cpu))
    told = (data_report.line(facts), data_report.evaluations(facts), *data_report.warnings(facts))
    return [f"training on {where}", *notes, *told, forecast(found, spec.budget)]


def forecast(found: Forecast, budget: Budget) -> str:
    """What a trial will take and when the budget will be spent, in a sentence."""
    share = found.evaluating / found.seconds
    said = (
        f"a trial will take about {wording.duration(found.seconds)}, {share:.0%} of it "
        f"evaluations, and {tables.size(found.peak_bytes)} of memory"
    )
    whole = math.inf if budget.trials is None else budget.trials * found.seconds
    hours = min(filter(None, (budget.hours, budget.wall_hours)), default=math.inf)
    if hours * 3600 < whole:
        count = hours * 3600 / found.seconds
        limit = wording.duration(hours * 3600)
        return f"{said}; {limit} are about {count:.0f} trials where none is pruned"
    if budget.trials is None:
        return said
    return f"{said}; {budget.trials} trials {wording.duration(whole)} where none is pruned"
