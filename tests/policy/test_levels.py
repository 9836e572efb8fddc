from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.levels import Grid
from optuna_lora_rl.policy.levels import Levels
from optuna_lora_rl.policy.levels import make_grid


def values(dimension: Dimension, levels: Levels | dict[str, Levels] | None = None) -> list:
    grid = make_grid(make_space([dimension]), levels)
    return [grid.space.dimensions[0].decode(u) for u in grid.arms[0]]


def test_ranks_are_powers_of_two_and_learning_rates_equal_factors() -> None:
    assert values(Dimension("lora_rank", "int", 2, 64)) == [2, 4, 8, 16, 32, 64]
    assert values(Dimension("lora_rank", "int", 3, 50, log=True)) == [4, 8, 16, 32]
    assert values(Dimension("lora_alpha", "float", 1.0, 16.0)) == pytest.approx([1, 2, 4, 8, 16])
    rates = values(Dimension("learning_rate", "float", 1e-5, 1e-2, log=True))
    assert rates[0] == 1e-5 and rates[-1] == 1e-2
    assert np.ptp(np.diff(np.log(rates))) < 1e-9


def test_choices_and_short_ranges_keep_all_their_values() -> None:
    assert values(Dimension("optim", "categorical", choices=tuple("abcdefghij"))) == [
        *"abcdefghij"
    ]
    assert values(Dimension("n", "int", 3, 6)) == [3, 4, 5, 6]
    assert values(Dimension("d", "float", 0.0, 0.3, step=0.1)) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert values(Dimension("x", "float", 1.0, 1.0)) == [1.0]


def test_the_user_says_how_many_levels_or_which() -> None:
    rank = Dimension("lora_rank", "int", 2, 64)
    assert values(rank, {"lora_rank": [64, 8, 1000, 8]}) == [8, 64]
    assert len(values(rank, 3)) == 3
    assert len(values(rank, {"lora_rank": 4, "other": 9})) == 4
    assert values(rank, {"other": 9}) == values(rank)
    assert len(values(Dimension("x", "float"), 4)) == 4


@pytest.mark.parametrize(
    ("dimension", "allowed"),
    [
        (Dimension("a", "int", 2, 64), "between 2 and 64"),
        (Dimension("a", "categorical", choices=("x", "y")), r"one of \['x', 'y'\]"),
    ],
)
def test_levels_outside_the_range_are_refused(dimension: Dimension, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"levels of 'a' are .*{allowed}"):
        values(dimension, {"a": [128, 256]})


def grid_of_three() -> Grid:
    space = make_space(
        [
            Dimension("lora_rank", "int", 2, 64),
            Dimension("x", "float", -1.0, 1.0),
            Dimension("kind", "categorical", choices=("a", "b")),
        ]
    )
    return make_grid(space)


@given(st.integers(0, 2**32 - 1))
def test_points_of_cells_lead_back_to_the_cells(seed: int) -> None:
    grid = grid_of_three()
    cells = grid.random(5, np.random.default_rng(seed))
    points = grid.points(cells)
    assert (grid.cells(points) == cells).all()
    assert grid.exactly(points, cells).all()
    assert grid.space.snap(points) == pytest.approx(points)


def test_a_value_between_levels_teaches_the_nearest_and_one_outside_teaches_none() -> None:
    grid = grid_of_three()
    points = np.stack(
        [
            grid.space.encode({"lora_rank": 15, "x": 0.05, "kind": "b"}),
            grid.space.encode({"lora_rank": 200, "kind": "c"}),
        ]
    )
    cells = grid.cells(points)
    assert grid.space.decode(grid.points(cells)[0]) == {"lora_rank": 16, "x": 0.0, "kind": "b"}
    assert (cells[1] == -1).all()
    assert not grid.exactly(points, cells).any()


def test_neighbours_differ_in_one_level() -> None:
    grid = grid_of_three()
    cell = np.array([0, 3, 1])
    around = grid.neighbours(cell)
    assert len(around) == sum(grid.sizes - 1)
    assert ((around != cell).sum(axis=1) == 1).all()
