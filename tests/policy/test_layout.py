from __future__ import annotations

import math

import pytest
import torch

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import layout_of
from optuna_lora_rl.policy.layout import stack

RATE = Dimension("learning_rate", "float", 1e-5, 1e-1, log=True)
RANK = Dimension("lora_rank", "int", 2.0, 64.0, log=True)
ALPHA = Dimension("lora_alpha", "int", 1.0, 256.0, log=True)
RATIO = Dimension("lora_alpha_ratio", "float", 0.25, 8.0, log=True)


def _coordinates(dimensions: list[Dimension], *configurations: dict[str, float]) -> torch.Tensor:
    space = make_space(dimensions)
    points = torch.stack([torch.from_numpy(space.encode(c)) for c in configurations])
    return layout_of(space).model_coordinates(points[None])[0]


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
        points = torch.rand(1, 5, 2, dtype=torch.float64)
        assert torch.equal(layout_of(make_space(dimensions)).model_coordinates(points), points)


def test_gradients_come_back_through_the_turned_axes() -> None:
    spaces = [[RATE, RANK, ALPHA], [RATE, RANK, RATIO], [RANK, ALPHA, RATE], [ALPHA, RATE]]
    layout: Layout = stack([layout_of(make_space(dimensions)) for dimensions in spaces])
    generator = torch.Generator().manual_seed(0)
    # Not at the nodes of the tables, where slopes jump.
    x = (torch.randint(64, (4, 6, 3), generator=generator) + 0.4).double() / 64
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    (layout.model_coordinates(x) * weight).sum().backward()
    real = layout.real[:, None].expand_as(x)
    pulled = layout.pull_back(x.detach(), weight)
    assert x.grad is not None
    assert pulled[real].tolist() == pytest.approx(x.grad[real].tolist(), abs=1e-6)
