"""Whole numbers that a float cannot hold."""

from __future__ import annotations

import optuna
import pytest

from optuna_lora_rl import BanditSampler
from optuna_lora_rl import LoraSpace
from optuna_lora_rl import RLSampler
from optuna_lora_rl.errors import UserError


@pytest.mark.parametrize("make", [RLSampler, BanditSampler])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (2**63 - 100, 2**63 - 1),
        (2**63 - 3, 2**63 - 1),
        (2**53 - 5, 2**53 + 7),
        (-(2**63), 2**63 - 1),
        (-(2**63), 5 - 2**63),
    ],
)
def test_the_objective_sees_no_value_out_of_range(
    make: type[optuna.samplers.BaseSampler], low: int, high: int
) -> None:
    seen = []

    def objective(trial: optuna.Trial) -> float:
        seen.append(trial.suggest_int("x", low, high))
        return (seen[-1] - low) / (high - low)

    study = optuna.create_study(sampler=make(seed=1))  # type: ignore[call-arg]
    study.optimize(objective, n_trials=12)
    assert all(type(value) is int and low <= value <= high for value in seen)


@pytest.mark.parametrize(
    "form", [2**53 + 1, [8, 2**60], {"low": 1, "high": 2**63 - 1, "log": True}]
)
def test_a_file_cannot_ask_for_whole_numbers_that_optuna_cannot_store(form: object) -> None:
    with pytest.raises(UserError, match=r"space\.lora_rank: .* is out of range"):
        LoraSpace({"lora_rank": form})
