"""The fine-tuner of a study, and what its trials will take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.rank import tables
from optuna_lora_rl.study import data_report
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import wording
from optuna_lora_rl.vocabulary import DEFAULTS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.forecast import Forecast
    from optuna_lora_rl.finetuning.options import TrainingOptions
    from optuna_lora_rl.study.spec import Budget
    from optuna_lora_rl.study.spec import StudySpec
    from optuna_lora_rl.vocabulary import Configuration
    from optuna_lora_rl.vocabulary import Value


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


# What a run's counted cost depends on beside the rank.
_COUNTED = (
    *("target_modules", "layers", "batch_size", "max_steps", "num_train_epochs"),
    *("optim", "use_dora", "lora_dropout", "init_lora_weights"),
)
_STRAIGHT = ("lora_rank", "rank_allocation", "rank_change", "truncate_energy", "truncate_rank")


class CountedCost:
    """What the score of a study's configurations is charged, counted without running them.

    With the same rank in every layer it rises in a straight line with the rank, so that two ranks
    tell all of them.

    Args:
        spec: of the study.
        tuner: its fine-tuner.
    """

    def __init__(self, spec: StudySpec, tuner: FineTuner) -> None:
        self._weight, self._tuner = spec.objective.cost_weight, tuner
        self._space, self._tuned = spec.lora_space(), spec.lora_space().distributions()
        self._lines: dict[tuple[Value, ...], tuple[float, float]] = {}

    @staticmethod
    def holds(spec: StudySpec) -> bool:
        """Whether the score of a study is charged so."""
        objective, usual = spec.objective, spec.lora_space().middle()
        rank = spec.lora_space().distributions().keys() & set(_STRAIGHT[1:])
        plain = all(usual[name] == DEFAULTS[name] for name in _STRAIGHT[1:])
        counted = objective.cost_source == "estimated" and objective.cost_weight > 0
        return counted and spec.n_objectives == 1 and plain and not rank

    def __call__(self, params: Mapping[str, Value]) -> float:
        """The charge of an Optuna trial's parameters."""
        read = {
            name: params[name]
            for name in self._tuned
            if name in (*_COUNTED, "lora_rank", "lora_rank_ratio") and name in params
        }
        # What has no part in it may be anything.
        others = {name: _any(one) for name, one in self._tuned.items() if name not in read}
        configuration = self._space.resolve({**others, **read})
        key = tuple(configuration[name] for name in _COUNTED)
        if key not in self._lines:
            low, high = (self._count({**configuration, "lora_rank": rank}) for rank in (1, 129))
            self._lines[key] = low, (high - low) / 128.0
        start, slope = self._lines[key]
        return start + slope * (int(configuration["lora_rank"]) - 1)

    def _count(self, configuration: Configuration) -> float:
        return self._weight * self._tuner.estimate(configuration)[1]["total"]


def _any(distribution: BaseDistribution) -> Value:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]  # type: ignore[return-value]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low


def qualities(spec: StudySpec, adapter: Path, on_activity: OnActivity = unseen) -> list[float]:
    """Evaluates a saved adapter, cut to each share of its energy.

    Args:
        spec: Whose model, data and metric.
        adapter: Folder of the adapter.
        on_activity: Told how far it is.

    Returns:
        The qualities, in the order of :func:`optuna_lora_rl.rank.truncation.sizes`.

    Raises:
        UserError: When model, data or adapter cannot be had, or do not go together.
    """
    opening.claim(spec)
    tuner = make(spec, cache=spec.folder / "cache", on_activity=on_activity)
    return tuner.cut(adapter)
