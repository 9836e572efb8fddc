"""What a study's file may say about ranks that change in training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import PositiveInt
from pydantic import model_validator


class Section(BaseModel):
    """Keys and values that cannot be changed, none of them unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LossRankOptions(Section):
    """When the course of the loss changes the ranks of all layers."""

    source: Literal["train", "eval"] = Field(
        default="train",
        description="Which loss: that of training, or that of the evaluations, which compare "
        "only with `training.first_evaluation: 1`, and with `auto` are made to.",
        examples=["train"],
    )
    every: PositiveInt = Field(
        default=5,
        description="Optimizer steps over which a training loss is a mean.",
        examples=[5],
    )
    window: int = Field(
        default=5, ge=3, description="How many losses are looked at.", examples=[5]
    )
    plateau: float = Field(
        default=0.01,
        gt=0,
        description="Relative fall over the window under which the loss stands still.",
        examples=[0.01],
    )
    calm: float = Field(
        default=0.01,
        gt=0,
        description="Relative scatter under which a standing loss is a plateau: ranks grow.",
        examples=[0.01],
    )
    oscillation: float = Field(
        default=0.05,
        gt=0,
        description="Relative scatter from which a loss oscillates: ranks shrink.",
        examples=[0.05],
    )

    @model_validator(mode="after")
    def _in_order(self) -> LossRankOptions:
        if self.calm > self.oscillation:
            raise ValueError(
                f"calm is {self.calm:g}, but must be at most oscillation, {self.oscillation:g}"
            )
        return self


class GradientRankOptions(Section):
    """When the spectrum of its gradient changes a layer's rank."""

    every: PositiveInt = Field(
        default=10,
        description="Optimizer steps from one look at the gradients to the next.",
        examples=[10],
    )
    columns: PositiveInt = Field(
        default=128,
        description="Width of the gradients' sketches; at least the largest rank.",
        examples=[128],
    )
    energy: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Share of the gradient's energy; the directions that hold it are needed.",
        examples=[0.95],
    )
    consistent: float = Field(
        default=0.1,
        ge=-1,
        le=1,
        description="Cosine of successive gradients from which a layer may grow.",
        examples=[0.1],
    )
    fading: float = Field(
        default=0.2,
        ge=0,
        description="Fall of the norm, per look, from which a layer may not grow.",
        examples=[0.2],
    )
    slack: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="A layer shrinks when it needs no more than this share of its rank.",
        examples=[0.5],
    )
    window: int = Field(
        default=3, ge=2, description="How many gradients are looked at.", examples=[3]
    )


class RankChangeOptions(Section):
    """How ranks change in training, where the parameter `rank_change` says that they do."""

    grow: float = Field(
        default=1.5, gt=1, description="Factor of a rank that grows.", examples=[1.5]
    )
    shrink: float = Field(
        default=0.8, gt=0, lt=1, description="Factor of a rank that shrinks.", examples=[0.8]
    )
    minimum: PositiveInt = Field(default=1, description="The smallest rank.", examples=[1])
    maximum: PositiveInt = Field(default=64, description="The largest rank.", examples=[64])
    mean_rank: float | None = Field(
        default=None,
        ge=1,
        description="Ranks grow only until all layers together have as many parameters as with "
        "this rank each; by gradient, layers with the most energy in theirs grow first. Left out, "
        "only `maximum` bounds them.",
        examples=[8],
    )
    patience: PositiveInt = Field(
        default=2,
        description="How many times in a row a verdict must come before ranks change.",
        examples=[2],
    )
    loss: LossRankOptions = Field(
        default_factory=LossRankOptions,
        description="Thresholds of `rank_change: loss`.",
        examples=[{"window": 5}],
    )
    gradient: GradientRankOptions = Field(
        default_factory=GradientRankOptions,
        description="Thresholds of `rank_change: gradient`.",
        examples=[{"every": 10}],
    )

    @model_validator(mode="after")
    def _in_order(self) -> RankChangeOptions:
        if self.minimum > self.maximum:
            raise ValueError(
                f"minimum is {self.minimum}, but must be at most maximum, {self.maximum}"
            )
        return self
