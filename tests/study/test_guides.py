"""The configuration that guides name."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl.study import guides

LORA = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "lora_rank": IntDistribution(2, 128, log=True),
    "lora_alpha": IntDistribution(2, 256, log=True),
    "lora_dropout": FloatDistribution(0.0, 0.3),
    "target_modules": CategoricalDistribution(["qv", "mlp", "all-linear"]),
}


def test_defaults_are_what_guides_say() -> None:
    params = guides.defaults(LORA)
    assert params["lora_rank"] == 16 and params["lora_alpha"] == 32
    assert params["learning_rate"] == pytest.approx(2e-4)
    assert params["lora_dropout"] == 0 and params["target_modules"] == "all-linear"


def test_defaults_outside_a_range_move_to_its_end() -> None:
    shifted = LORA | {
        "learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
        "lora_rank": CategoricalDistribution([32, 64]),
    }
    params = guides.defaults(shifted)
    assert params["learning_rate"] == pytest.approx(1e-3)
    assert params["lora_rank"] == 32 and params["lora_alpha"] == 64


def test_defaults_of_another_trade_are_the_middle() -> None:
    space = {
        "depth": IntDistribution(1, 9),
        "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
    }
    assert guides.defaults(space) == {"depth": 5, "learning_rate": pytest.approx(1e-2)}
