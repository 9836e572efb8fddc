"""What a study's YAML file may say.

The sections ``model``, ``data``, ``training`` and ``objective`` are the option models of
``finetuning``; the rest stands here. ``docs/configuration.md`` is generated from these models
(``study/reference.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import field_validator
from pydantic import model_validator

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.space import LoraSpace
from optuna_lora_rl.study import reading
from optuna_lora_rl.study.storage import DATABASE
from optuna_lora_rl.study.storage import sqlite_url

# Sections that may be written as one value, and the key that the value is for.
SHORT_FORMS = {
    "model": "name",
    "data": "train",
    "sampler": "name",
    "pruner": "name",
    "budget": "trials",
}

SamplerName = Literal["rl", "bandit", "tpe", "gp", "cmaes", "random", "qmc", "nsgaii"]
PrunerName = Literal[
    "none",
    "async-halving",
    "peer-median",
    "cost-aware",
    "pareto",
    "median",
    "percentile",
    "successive-halving",
    "hyperband",
    "threshold",
    "patient",
    "wilcoxon",
]
Count = Annotated[int, Field(ge=1)]
# Bytes; file systems take 255, and other programs put theirs to it.
_LONGEST_NAME = 200
# The study that comes with the package.
_QUICKSTART = Path(__file__).with_name("quickstart.yaml")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SamplerChoice(BaseModel):
    """Which sampler proposes the configurations; further keys are its own options."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    name: SamplerName = Field(default="rl", description="The sampler; `rl` is the learned one.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the proposals. The same file with the same seed proposes the same "
        "configurations on one machine, also when it is interrupted and resumed (one trial at a "
        "time; not for `cmaes`, whose own random numbers start again). Another kind of processor "
        "rounds otherwise, so that scores, and what follows from them, differ; with "
        "`budget.hours` the time that trials take tells `rl` how many there will be.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside name and seed."""
        return dict(self.__pydantic_extra__ or {})


class PrunerChoice(BaseModel):
    """Which pruner stops hopeless trials early; further keys are its own options."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    name: PrunerName = Field(
        default="none",
        description="The pruner. It sees the score after each of a trial's evaluations; its steps "
        "count evaluations. `async-halving`, `peer-median` and `cost-aware` judge a trial among "
        "running ones too, so they suit packed trials. `pareto` is for two objectives, the only "
        "one that prunes them.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside name."""
        return dict(self.__pydantic_extra__ or {})


class EarlierStudy(BaseModel):
    """A study to start from."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    study: str | None = Field(
        default=None, description="Its name; may be left out where the storage holds one study."
    )
    storage: str | None = Field(
        default=None,
        description="SQLAlchemy URL, or the output folder of an earlier run; `null` means this "
        "study's own storage.",
    )

    @model_validator(mode="after")
    def _names_something(self) -> EarlierStudy:
        if self.study is None and self.storage is None:
            raise ValueError("give study, storage, or both")
        return self


class Budget(BaseModel):
    """When the study ends: at whichever of these comes first."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    trials: Count | None = Field(
        default=20,
        description="Number of trials, over all runs and workers. Completed, pruned and failed "
        "trials count; killed and interrupted ones do not. `null` means no limit.",
    )
    hours: Positive | None = Field(
        default=None,
        description="Hours of training, added over all trials, runs and workers (so GPU hours, "
        "not hours on the clock). No trial starts after that; the running one ends normally.",
    )
    wall_hours: Positive | None = Field(
        default=None,
        description="Hours on the clock since the command started; the same command later has "
        "them anew. No trial starts after that; the running one ends normally.",
    )
    cost: Positive | None = Field(
        default=None,
        description="Total cost of the trials, in runs of the reference configuration. No trial "
        "starts after that.",
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Budget:
        if all(limit is None for limit in (self.trials, self.hours, self.wall_hours, self.cost)):
            raise ValueError(
                "give at least one of trials, hours, wall_hours and cost, or it never ends"
            )
        return self


class StudySpec(BaseModel):
    """One study: a base model, data, a search space, a sampler and a budget."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str = Field(
        min_length=1,
        description="The study's name in the storage; the file's name where nothing is said.",
    )
    model: ModelOptions = Field(
        default_factory=ModelOptions,
        description="The base model; `model: tiny` is short for its name.",
    )
    data: DataOptions = Field(description="The data; `data: file.jsonl` is short for data.train.")
    space: dict[str, Any] | None = Field(
        default=None,
        description="What is tuned, fixed or tied, parameter by parameter; see below. `null` "
        "means the recommended space.",
    )
    target_sets: dict[str, list[str]] = Field(
        default={},
        description="Names for lists of module-name suffixes, to be used as values of "
        "`target_modules`.",
    )
    training: TrainingOptions = Field(
        default_factory=TrainingOptions, description="How every trial trains and evaluates."
    )
    objective: ObjectiveOptions = Field(
        default_factory=ObjectiveOptions, description="What makes a configuration good."
    )
    sampler: SamplerChoice = Field(
        default_factory=SamplerChoice,
        description="Who proposes; `sampler: tpe` is short for its name.",
    )
    transfer_from: list[str | EarlierStudy] = Field(
        default=[],
        description="Earlier studies that `sampler: rl` starts from, each the output folder of an "
        "earlier run, a storage's URL, the name of a study in this study's storage, or `{study: "
        "name, storage: URL or folder}`. Other models, data, parameters, ranges and metrics are "
        "fine; one that misleads is dropped within a few trials.",
    )
    first_trial: Literal["sampler", "guides"] = Field(
        default="sampler",
        description="What is tried first: what the sampler proposes (`sampler`), or what guides "
        "to LoRA recommend (`guides`): rank 16, alpha 32, learning rate 2e-4, all linear layers, "
        "no dropout, batch 16, each at the nearest value that `space` allows, and the middle of "
        "what else is tuned. That is one of the budget's trials, no pruner stops it, its adapter "
        "is kept, and it stands beside the best when the study ends.",
    )
    pruner: PrunerChoice = Field(
        default_factory=PrunerChoice,
        description="Who stops trials early; `pruner: median` is short.",
    )
    budget: Budget = Field(
        default_factory=Budget, description="When it ends; `budget: 20` is short for trials."
    )
    answers: Annotated[int, Field(ge=0)] = Field(
        default=16,
        description="How many held-out questions are answered when the study ends, by the "
        "untuned model, the best adapter and the guides' trial (`first_trial: guides`). They are "
        "of the test split, or of validation where there is none. Exact matches are counted over "
        "all of them; the first three are shown. Each takes at most `objective.max_new_tokens` "
        "tokens. A metric that compares answers asks `objective.generation_samples` instead; data "
        "of plain text ask nothing, nor does 0.",
    )
    packing: Literal["off", "auto"] | Count = Field(
        default="off",
        description="How many trials train side by side over one pass of the frozen base model: "
        "`off` for one after the other, `auto` for as many reference configurations, eight at "
        "most, as a GPU's free memory is estimated to hold and one on a CPU, where packs save "
        "nothing, or at most this many. A trial gives the same result in all cases, to float "
        "tolerance and to the draws of dropout, so a study may go on with another value. "
        "What cannot be packed runs alone. Not to be mixed up with `training.packing`, which puts "
        "several examples into one row.",
    )
    storage: str | None = Field(
        default=None,
        description="SQLAlchemy URL of the database, such as `postgresql://user@host/name` for "
        "several workers; `null` means `study.db` in the output folder. An `@` in a password is "
        "written `%40`; no message, log or page shows passwords.",
    )
    output: str | None = Field(
        default=None,
        description="Folder for adapters, report and database, new, empty or this study's; `null` "
        "means `runs/<name>`.",
    )

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if "/" in name or "\\" in name:
            raise ValueError(f"name is {name!r}, but names a folder too and must have no slash")
        if name in (".", "..") or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"name is {name[:40]!r}, but names a folder too: it must not be . or .., hold no "
                f"line breaks or other control characters, and have at most {_LONGEST_NAME} bytes"
            )
        return name

    @field_validator("packing", mode="before")
    @classmethod
    def _is_a_packing(cls, packing: Any) -> Any:
        if packing is False:
            # YAML 1.1 reads a bare "off" as false.
            return "off"
        is_count = isinstance(packing, int) and packing is not True and packing >= 1
        if not is_count and packing not in ("off", "auto"):
            raise ValueError(
                f"packing is {packing!r}, but must be off, auto, or a whole number, at least 1"
            )
        return packing

    @model_validator(mode="after")
    def _fits_together(self) -> StudySpec:
        if not self.lora_space().distributions() and self.budget.trials != 1:
            raise ValueError(
                "space tunes nothing, so that every trial would run the same configuration; add "
                "defaults: true to tune what is not named over the recommended ranges, give a "
                "parameter a range or a list of values, or set budget.trials to 1"
            )
        if self.packing != "off":
            self._check_packing()
        if self.transfer_from and self.sampler.name != "rl":
            raise ValueError(
                f"transfer_from is given, but sampler.name is {self.sampler.name!r}; only rl "
                "learns from earlier studies"
            )
        if self.pruner.name == "pareto" and not self.objective.cost_weight:
            raise ValueError(
                "pruner is 'pareto', but objective.cost_weight is 0, so that no run's cost is "
                "known before its end; give it a weight above 0, which two objectives do not use"
            )
        return self

    def _check_packing(self) -> None:
        if self.objective.cost_source == "measured":
            raise ValueError(
                f"packing is {self.packing!r}, but objective.cost_source is 'measured': the time "
                "and memory of one trial cannot be told apart in a pack; use cost_source: "
                "estimated, or packing: off"
            )

    def lora_space(self) -> LoraSpace:
        """The search space that ``space`` and ``target_sets`` describe."""
        return LoraSpace(self.space, target_sets=self.target_sets)

    def earlier_studies(self) -> list[EarlierStudy]:
        """``transfer_from`` written out."""
        return [_written_out(e) if isinstance(e, str) else e for e in self.transfer_from]

    @property
    def n_objectives(self) -> int:
        return len(self.objective.objectives)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def storage_url(self) -> str:
        return self.storage or sqlite_url(self.folder / DATABASE)


def _written_out(entry: str) -> EarlierStudy:
    """A study's name, unless it is a URL or a folder."""
    is_storage = "://" in entry or "/" in entry or Path(entry).is_dir()
    return EarlierStudy(storage=entry) if is_storage else EarlierStudy(study=entry)


def load(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Reads a study's file.

    Args:
        path: The YAML file; ``quickstart``, where there is no such file, for the package's own.
        overrides: ``key=value`` assignments over it, such as ``budget.trials=5``.

    Raises:
        UserError: Naming every mistake with its key, its value and what is allowed.
    """
    is_own = str(path) == _QUICKSTART.stem and not Path(path).exists()
    content = reading.read_yaml(_QUICKSTART if is_own else path)
    reading.override(content, overrides, SHORT_FORMS)
    content.setdefault("name", Path(path).stem)
    return parse(content, str(path))


def parse(content: Mapping[str, Any], source: str) -> StudySpec:
    """The spec in ``content``, whose mistakes are reported as mistakes of ``source``."""
    # An empty section ("budget:") says nothing, rather than null.
    said = {key: value for key, value in content.items() if value is not None}
    spec = reading.validate(StudySpec, reading.expand(said, SHORT_FORMS), source)
    _check_choices(spec, source)
    return spec


def _check_choices(spec: StudySpec, source: str) -> None:
    """Refuses options that the chosen sampler or pruner does not have."""
    from optuna_lora_rl import pruners
    from optuna_lora_rl import samplers

    try:
        samplers.check(spec.sampler.name, n_objectives=spec.n_objectives)
        samplers.create(spec.sampler.name, seed=spec.sampler.seed, options=spec.sampler.options)
        pruners.check(
            spec.pruner.name,
            spec.pruner.options,
            n_objectives=spec.n_objectives,
            evaluations=spec.training.evaluations,
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
