"""The plain parameters of one trial, checked and typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.vocabulary import BOTH
from optuna_lora_rl.vocabulary import OWN_INITIALISATIONS
from optuna_lora_rl.vocabulary import VOCABULARY
from optuna_lora_rl.vocabulary import Value
from optuna_lora_rl.vocabulary import unknown_parameter


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One trial's parameters; names and meanings are those of ``vocabulary.VOCABULARY``."""

    lora_rank: int
    rank_allocation: str
    rank_change: str
    truncate_energy: float
    truncate_rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str
    layers: str
    bias: str
    init_lora_weights: str
    use_rslora: bool
    use_dora: bool
    learning_rate: float
    batch_size: int
    optim: str
    weight_decay: float
    warmup_ratio: float
    lr_scheduler_type: str
    max_grad_norm: float
    max_steps: int
    num_train_epochs: float
    loraplus_lr_ratio: float

    @classmethod
    def of(cls, parameters: Mapping[str, Value]) -> Configuration:
        """Reads plain parameters; those left out have their defaults.

        Raises:
            FineTuningError: With reason ``"configuration"``, when a name is unknown, a value is
                out of range, or two values do not go together.
        """
        values: dict[str, Any] = {}
        try:
            for name in parameters:
                if name not in VOCABULARY:
                    raise UserError(unknown_parameter(name))
            for name, term in VOCABULARY.items():
                values[name] = term.check(name, parameters.get(name, term.default))
        except UserError as error:
            raise FineTuningError("configuration", str(error).removeprefix("space.")) from None
        return cls(**values)

    def __post_init__(self) -> None:
        init = self.init_lora_weights
        if init == "orthogonal" and self.lora_rank % 2:
            raise FineTuningError(
                "configuration",
                f"init_lora_weights orthogonal needs an even lora_rank, not {self.lora_rank}",
            )
        if init == "orthogonal" and self.rank_allocation != "uniform":
            raise FineTuningError(
                "configuration",
                f"init_lora_weights orthogonal needs even ranks, which rank_allocation "
                f"{self.rank_allocation} does not give",
            )
        if self.truncates and self.mutates_base:
            raise FineTuningError(
                "configuration",
                f"init_lora_weights {init} does not go with truncate: the adapter's update is a "
                "difference from its start",
            )
        if self.truncate_energy < 1 and self.truncate_rank:
            raise FineTuningError(
                "configuration",
                f"truncate_energy {self.truncate_energy:g} and truncate_rank {self.truncate_rank} "
                "are two limits of one rank; set one of them",
            )
        if init == "mica" and (self.truncates or self.rank_change != "none"):
            other = "truncate" if self.truncates else "rank_change"
            raise FineTuningError(
                "configuration",
                f"init_lora_weights mica does not go with {other}: its B matrices stay",
            )
        if init == "mica" and (self.use_dora or self.loraplus_lr_ratio != 1):
            other = "use_dora" if self.use_dora else "loraplus_lr_ratio"
            raise FineTuningError(
                "configuration",
                f"init_lora_weights mica does not go with {other}: it freezes the B matrices",
            )
        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise FineTuningError(
                "configuration",
                "lr_scheduler_type reduce_lr_on_plateau has no fixed course, so runs of "
                "different lengths cannot be compared; take linear, cosine or another schedule",
            )

    @property
    def truncates(self) -> bool:
        """Whether the adapter is cut after training."""
        return self.truncate_energy < 1 or self.truncate_rank > 0

    @property
    def mutates_base(self) -> bool:
        """Whether the base weights make up for the adapter's start."""
        return self.init_lora_weights.startswith(("olora", "pissa")) or (
            self.own_start is not None and self.own_start[1]
        )

    @property
    def own_start(self) -> tuple[str, bool] | None:
        """One of the package's own initialisations, and whether it is of both factors."""
        name = self.init_lora_weights.removesuffix(BOTH)
        if name not in OWN_INITIALISATIONS:
            return None
        return OWN_INITIALISATIONS[name], self.init_lora_weights.endswith(BOTH)

    @property
    def rank_limited(self) -> bool:
        """Whether the initialisation needs a rank that every layer has."""
        return self.init_lora_weights.startswith(("olora", "pissa", "mica"))
