from __future__ import annotations

import math

import numpy as np
import pytest

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout

RATE = Dimension("learning_rate", "float", 1e-5, 1e-1, log=True)
RANK = Dimension("lora_rank", "int", 2.0, 64.0, log=True)
ALPHA = Dimension("lora_alpha", "int", 1.0, 256.0, log=True)
RATIO = Dimension("lora_alpha_ratio", "float", 0.25, 8.0, log=True)


def _coordinates(dimensions: list[Dimension], *configurations: dict[str, float]) -> np.ndarray:
    space = make_space(dimensions)
    points = np.stack([space.encode(c) for c in configurations])
    return Layout(space).points(points).coordinates


def test_learning_rates_are_alike_at_the_same_product_with_the_root_of_alpha() -> None:
    z = _coordinates(
        [RATE, RANK, ALPHA],
        {"learning_rate": 1e-3, "lora_rank": 8, "lora_alpha": 64},
        {"learning_rate": 2e-3, "lora_rank": 8, "lora_alpha": 16},
        {"learning_rate": 2e-3, "lora_rank": 32, "lora_alpha": 64},
    )
    assert float(z[0, 0]) == pytest.approx(float(z[1, 0]), abs=1e-3)
    # Four times the alpha is twice the learning rate, of four decades.
    assert float(z[2, 0] - z[1, 0]) == pytest.approx(math.log10(2.0) / 4, abs=1e-3)
    # Alpha's axis is that of its ratio to the rank: eight, two, two.
    assert float(z[0, 2]) == pytest.approx(3 * float(z[1, 2]), rel=0.01)
    assert float(z[2, 2]) == pytest.approx(float(z[1, 2]), rel=0.01)


def test_a_ratio_of_alpha_counts_like_the_alpha_that_it_means() -> None:
    z = _coordinates(
        [RATE, RANK, RATIO],
        {"learning_rate": 1e-3, "lora_rank": 8, "lora_alpha_ratio": 8.0},
        {"learning_rate": 2e-3, "lora_rank": 8, "lora_alpha_ratio": 2.0},
        {"learning_rate": 2e-3, "lora_rank": 16, "lora_alpha_ratio": 1.0},
    )
    assert float(z[0, 0]) == pytest.approx(float(z[1, 0]), abs=1e-3)
    assert float(z[1, 0]) == pytest.approx(float(z[2, 0]), abs=1e-3)


def test_axes_of_other_trades_are_left_as_they_are() -> None:
    elastic_net = [RATE, Dimension("alpha", "float", 1e-3, 1.0, log=True)]
    for dimensions in (elastic_net, [RATE, RANK]):
        points = np.random.default_rng(0).random((5, 2))
        layout = Layout(make_space(dimensions))
        assert np.array_equal(layout.points(points).coordinates, points)
        assert np.array_equal(layout.model_coordinates(points)[0], points)


@pytest.mark.parametrize(
    "dimensions", [[RATE, RANK, ALPHA], [RATE, RANK, RATIO], [RANK, ALPHA, RATE], [ALPHA, RATE]]
)
def test_gradients_come_back_through_the_turned_axes(dimensions: list[Dimension]) -> None:
    layout, rng = Layout(make_space(dimensions)), np.random.default_rng(0)
    # Not at the nodes of the tables, where slopes jump.
    x = (rng.integers(64, size=(6, len(dimensions))) + 0.4) / 64
    weight = rng.normal(size=x.shape)
    z, slopes = layout.model_coordinates(x)
    assert np.allclose(z, layout.points(x).coordinates)
    pulled = layout.pull_back(weight.copy(), slopes)
    for column in range(len(dimensions)):
        step = np.zeros(len(dimensions))
        step[column] = 1e-6
        ends = [layout.points(x + sign * step).coordinates for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) * weight).sum(1) / 2e-6
        assert pulled[:, column] == pytest.approx(slope, abs=1e-6)
