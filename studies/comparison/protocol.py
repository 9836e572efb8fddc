"""What the file of a comparison may say."""

from __future__ import annotations

from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import model_validator

from optuna_lora_rl.learning.statistics import FLOOR
from studies.comparison.functions import BBOB
from studies.comparison.measured import GUISES
from studies.comparison.peers import NAMES
from studies.comparison.synthetic import TEST_SEED

Count = Annotated[int, Field(ge=1)]


class SamplerEntry(BaseModel):
    """A sampler of the comparison; further keys are its own options."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    name: str = Field(description="The sampler; the entry's own name where nothing is said.")
    import_: str | None = Field(
        default=None,
        alias="import",
        description="A sampler of your own, `module:Class`; seed, space and n_trials are given to "
        "it where it takes them.",
    )
    start: Literal["none", "defaults", "sweep"] = Field(
        default="none",
        description="What a person tries before the sampler takes over: nothing, the guides' "
        "defaults, or an expert's sweep of five learning rates.",
    )
    failures: Literal["failed", "worst"] = Field(
        default="failed",
        description="What it is told of a run that fails: that it failed, which TPE and GP leave "
        "out of account, or the worst score so far, as a person may do for them.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The sampler's own, which are all further keys."""
        return dict(self.__pydantic_extra__ or {})


class _Family(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Synthetic(_Family):
    """Tasks of the training families, drawn with another seed."""

    tasks: Count = Field(default=32, description="How many.")
    seed: int = Field(default=TEST_SEED, ge=0, description="Tasks of other seeds differ.")


class Tables(_Family):
    """Measured LoRA tables."""

    split: Literal["train", "validation", "test"] = Field(
        default="test", description="Of which families; choices are made on `validation`."
    )
    guises: list[Literal[tuple(GUISES)]] = Field(  # type: ignore[valid-type]
        default=list(GUISES), min_length=1, description="Spaces and weights of cost."
    )


class Networks(_Family):
    """Tuning scikit-learn's MLPClassifier, measured on three data sets."""


class Functions(_Family):
    """BBOB-like functions, shifted and rotated."""

    families: list[Literal[tuple(BBOB)]] = Field(  # type: ignore[valid-type]
        default=list(BBOB), min_length=1, description="Which."
    )
    dimensions: list[Annotated[int, Field(ge=2, le=40)]] = Field(
        default=[2, 5, 10], min_length=1, description="In how many dimensions each."
    )
    instances: Count = Field(default=1, description="Shifts and rotations of each.")
    first: int = Field(default=0, ge=0, description="Number of the first instance.")
    classics: bool = Field(default=False, description="Also Branin and Hartmann's function.")


class Mixed(_Family):
    """Spaces of floats, integers, logarithmic scales and categories, not of LoRA."""

    instances: Count = Field(default=4, description="How many.")
    first: int = Field(default=0, ge=0, description="Number of the first instance.")


class Problems(_Family):
    """The problems, by family; families that are not named are left out."""

    tables: Tables | None = Field(default=None, description="Measured LoRA tables.")
    synthetic: Synthetic | None = Field(default=None, description="Synthetic LoRA studies.")
    functions: Functions | None = Field(default=None, description="BBOB-like functions.")
    mixed: Mixed | None = Field(default=None, description="Mixed spaces, not of LoRA.")
    networks: Networks | None = Field(default=None, description="Tuning of small classifiers.")
    import_: list[str] | None = Field(
        default=None,
        alias="import",
        min_length=1,
        description="Problems of your own, each `module:name`: a Problem, a list of them, or a "
        "function that returns either.",
    )


class Protocol(BaseModel):
    """A comparison: samplers, problems, seeds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str = Field(min_length=1, description="The file's name where nothing is said.")
    samplers: dict[str, SamplerEntry] = Field(min_length=1, description="By a name of your own.")
    problems: Problems = Field(description="What they tune.")
    trials: Count = Field(default=50, description="Trials of a study.")
    seeds: Count = Field(default=5, description="Studies of each sampler on each problem.")
    workers: Count = Field(default=1, description="Processes, of one thread each.")
    reference: str = Field(default="", description="The others are compared with it; the first.")
    after: list[Count] = Field(
        default=[1, 3, 5, 10, 20, 30, 50], min_length=1, description="Trials to look after."
    )
    floor: float = Field(
        default=FLOOR, gt=0, description="Regret below which it does not matter in logarithms."
    )
    output: str = Field(default="", description="Folder for the results; `runs/<name>`.")

    @model_validator(mode="before")
    @classmethod
    def _name_samplers(cls, content: Any) -> Any:
        entries = content.get("samplers") if isinstance(content, dict) else None
        if not isinstance(entries, dict):
            return content
        named = {
            label: {"name": label} | (entry or {}) if isinstance(entry, dict | None) else entry
            for label, entry in entries.items()
        }
        return content | {"samplers": named}

    @model_validator(mode="after")
    def _fits_together(self) -> Protocol:
        for label, entry in self.samplers.items():
            if entry.import_ is None and entry.name not in NAMES:
                raise ValueError(
                    f"samplers.{label}.name is {entry.name!r}, but must be one of "
                    f"{', '.join(NAMES)}"
                )
        if self.reference and self.reference not in self.samplers:
            raise ValueError(
                f"reference is {self.reference!r}, but must be one of {', '.join(self.samplers)}"
            )
        if all(family is None for family in self.problems.model_dump().values()):
            families = ", ".join(f.alias or name for name, f in Problems.model_fields.items())
            raise ValueError(f"problems names no family, but must have some of {families}")
        return self

    @property
    def against(self) -> str:
        """The reference's name."""
        return self.reference or next(iter(self.samplers))

    @property
    def checkpoints(self) -> list[int]:
        """Trials to look after, within the budget; the last one is always looked at."""
        return sorted({k for k in self.after if k < self.trials} | {self.trials})
