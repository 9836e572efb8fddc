"""What a person tries first."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from studies.comparison import openings

LORA = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "lora_rank": IntDistribution(2, 128, log=True),
    "lora_alpha": IntDistribution(2, 256, log=True),
    "lora_dropout": FloatDistribution(0.0, 0.3),
    "target_modules": CategoricalDistribution(["qv", "mlp", "all-linear"]),
}


def _swept(score: Any) -> list[float]:
    """The learning rates of a sweep whose runs score what ``score`` says."""
    scores: list[float | None] = []
    rates = []
    while (params := openings.sweep(LORA, scores)) is not None:
        assert params["lora_rank"] == 16 and params["lora_alpha"] == 32
        rates.append(params["learning_rate"])
        scores.append(score(params["learning_rate"]))
    return rates


def test_a_sweep_follows_what_it_finds() -> None:
    # The higher the better: the last step lies between the two highest.
    assert _swept(lambda lr: lr) == pytest.approx([1e-3, 1e-4, 1e-2, 10**-1.4, 10**-1.7])
    # Best in the middle, and the lower side better than the upper one.
    assert _swept(lambda lr: {1e-4: 0.5, 1e-2: 0.0}.get(round(lr, 9), 1.0))[3] == pytest.approx(
        10**-3.5
    )
    # Runs that fail are the worst.
    high_fails = _swept(lambda lr: None if lr > 2e-4 else 1.0)
    assert high_fails[3] == pytest.approx(10**-4.6)


def test_a_sweep_without_a_learning_rate_is_one_trial() -> None:
    space = {"lora_rank": IntDistribution(2, 128, log=True)}
    assert openings.sweep(space, []) == {"lora_rank": 16}
    assert openings.sweep(space, [1.0]) is None
