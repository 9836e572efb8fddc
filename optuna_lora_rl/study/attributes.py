"""What this package writes down with a study and its trials, checked when it is read back."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from pydantic import BaseModel

if TYPE_CHECKING:
    import optuna


class _OfStudy(BaseModel):
    problem: dict[str, Any] = {}
    tuned: dict[str, str] = {}
    untuned: dict[str, float] = {}
    test: dict[str, float] = {}
    data: dict[str, Any] = {}
    devices: list[str] = []


class _Row(BaseModel):
    step: float = 0.0
    loss: float | None = None
    train_loss: float | None = None


class _Layers(BaseModel):
    sha256: str
    holds: list[str]


class _OfTrial(BaseModel):
    configuration: dict[str, Any] = {}
    score: float = 0.0
    quality: float = 0.0
    cost: float = 0.0
    loss: float = 0.0
    token_accuracy: float = 0.0
    seconds: float = 0.0
    trainable_parameters: int = 0
    curve: list[_Row] = []
    layers: _Layers | None = None
    ranks: dict[str, int] = {}
    rank_changes: list[dict[str, Any]] = []
    truncation: dict[str, float] = {}
    monitor: dict[str, Any] = {}
    failure: str = ""
    failure_message: str = ""
    host: str = ""
    pid: int = 0
    process_started: float = 0.0
    retry_of: int = 0


def check(study: optuna.Study) -> None:
    """Reads all trials and attributes of a study.

    Raises:
        ValueError: If one is not of the kind that is written.
    """
    _OfStudy.model_validate(study.user_attrs)
    for trial in study.get_trials(deepcopy=False):
        if not all(isinstance(name, str) for name in trial.params):
            raise ValueError(f"trial {trial.number} has a parameter without a name")
        _OfTrial.model_validate(trial.user_attrs)
