"""Two made-up tables whose truth is known, and their surfaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import costs
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.surfaces import Surfaces
from studies.tables import counting
from studies.tables import fitting

NAMES = ("tiny/dates-small", "tiny-wide/cipher-small")
_HEIGHT = {"qv": 0.0, "attention": 0.05, "mlp": 0.1, "all-linear": 0.15}
_SIZE = {"qv": 2, "attention": 4, "mlp": 6, "all-linear": 10}


def truth(configuration: dict[str, Any], peak: float) -> float:
    """Quality with a ridge in learning rate times alpha ratio; far above it runs diverge."""
    effective = np.log10(configuration["learning_rate"] * configuration["alpha_ratio"]) - peak
    if effective > 1.5:
        return -0.3
    return float(0.5 * np.exp(-0.5 * effective**2) + _HEIGHT[configuration["target_modules"]])


def price(configuration: dict[str, Any]) -> float:
    """Bilinear in rank and steps, linear in the batch, as counted costs are."""
    rank, steps = configuration["lora_rank"], configuration["max_steps"]
    size, batch = _SIZE[configuration["target_modules"]], configuration["batch_size"]
    dropped = 1.5 if configuration["lora_dropout"] > 0 else 1.0
    half = 1.0 if configuration["layers"] == "all" else 0.5
    return 1e-3 * (
        half * size * rank + steps * batch * (10 + half * size * rank / 64) + batch * dropped
    )


def table(name: str, count: int, peak: float) -> Table:
    drawn = design.configurations(count)
    quality = np.array([truth(one, peak) for one in drawn])
    curve = quality[:, None] * np.array([0.4, 0.7, 0.9, 1.0])
    zeros = np.zeros(count)
    return Table(
        task=design.TASKS[name],
        configuration=np.arange(count),
        seed=np.zeros(count, dtype=np.int64),
        parameters={key: np.array([one[key] for one in drawn]) for key in design.SPACE},
        step=np.ones((count, 4), dtype=np.int64),
        loss=3.0 * (1 - curve),
        accuracy=curve,
        quality=curve,
        failure=np.full(count, ""),
        cost=np.array([price(one) for one in drawn]),
        trainable_parameters=np.ones(count, dtype=np.int64),
        tokens=np.ones(count, dtype=np.int64),
        flops=zeros,
        bytes=zeros,
        seconds=zeros,
        untuned=3.0,
    )


@pytest.fixture(scope="session")
def prices() -> costs.Costs:
    return costs.Costs(torch.stack([counting.count(price)] * 2))


@pytest.fixture(scope="session")
def tables() -> list[Table]:
    return [table(NAMES[0], 120, -2.5), table(NAMES[1], 90, -4.0)]


@pytest.fixture(scope="session")
def fits(tables: list[Table], prices: costs.Costs) -> dict[str, Any]:
    return {one.task.name: fitting.fit(one, prices[:1]) for one in tables}


@pytest.fixture(scope="session")
def fitted(tables: list[Table], fits: dict[str, Any], prices: costs.Costs) -> Surfaces:
    return surfaces.of(tables, fits, prices)


def places(drawn: list[dict[str, Any]]) -> torch.Tensor:
    """Coordinates of configurations for both tables, shape (2, N, D)."""
    x = torch.tensor(np.array([coordinates.point(one) for one in drawn]))
    return x.expand(2, -1, -1)
