from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.roles import recognise

FLOAT = Dimension("x", "float", -3.0, 7.0)
LOG = Dimension("x", "float", 1e-6, 1e-1, log=True)
STEPPED = Dimension("x", "float", -10.2, 10.2, step=0.1)
INT = Dimension("x", "int", -4, 10, step=2)
LOG_INT = Dimension("x", "int", 1, 100, log=True)
RANKS = Dimension("x", "categorical", choices=(64, 8, 16))
MIXED = Dimension("x", "categorical", choices=(1, "a", None, True))
ALL = [FLOAT, LOG, STEPPED, INT, LOG_INT, RANKS, MIXED]


@given(st.sampled_from(ALL), st.floats(0, 1))
def test_decoding_then_encoding_is_snapping(dimension: Dimension, u: float) -> None:
    value = dimension.decode(u)
    assert dimension.encode(value) == pytest.approx(float(dimension.snap(np.array(u))), abs=1e-9)
    again = dimension.decode(dimension.encode(value))
    assert again == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)


@given(st.integers(0, 7))
def test_every_integer_of_a_range_comes_back(k: int) -> None:
    assert INT.decode(INT.encode(-4 + 2 * k)) == -4 + 2 * k


@pytest.mark.parametrize("dimension", [INT, LOG_INT, RANKS, MIXED, STEPPED])
def test_the_grid_holds_each_value_once(dimension: Dimension) -> None:
    values = [dimension.decode(u) for u in dimension.grid(limit=500)]
    assert len({(type(value), value) for value in values}) == dimension.n_levels == len(values)


def test_values_are_native_python_inside_the_range() -> None:
    assert type(FLOAT.decode(np.float64(0.3))) is float
    assert type(LOG_INT.decode(np.float64(0.3))) is int
    assert LOG.decode(0.0) == 1e-6
    assert LOG.decode(1.0) == 1e-1
    assert STEPPED.decode(2.0) == 10.2


def test_a_choice_is_not_mistaken_for_an_equal_one_of_another_type() -> None:
    dimension = Dimension("x", "categorical", choices=(True, 1, "1"))
    for choice in dimension.choices:
        decoded = dimension.decode(dimension.encode(choice))
        assert type(decoded) is type(choice)
        assert decoded == choice


def test_numeric_choices_are_ordered_and_names_are_not() -> None:
    assert RANKS.levels == (8, 16, 64)
    assert make_space([RANKS, MIXED]).is_categorical.tolist() == [False, True]
    assert RANKS.natural(np.array([1 / 6, 0.5])).tolist() == [8.0, 16.0]


def test_uniform_points_are_uniform_integers() -> None:
    values = [INT.decode(u) for u in np.linspace(0.001, 0.999, 8000)]
    counts = np.bincount(np.array(values) + 4)[::2]
    assert len(counts) == 8
    assert np.abs(counts - 1000).max() <= 10


def test_what_has_no_place_is_nan_and_what_is_out_of_range_stays_outside() -> None:
    assert math.isnan(MIXED.encode("b"))
    assert math.isnan(LOG.encode(0.0))
    assert LOG.encode(1.0) > 1.0
    assert math.isnan(FLOAT.encode("seven"))


def test_absent_parameters_stay_absent() -> None:
    space = make_space([FLOAT, Dimension("y", "int", 0, 3)])
    point = space.encode({"y": 2})
    assert math.isnan(point[0])
    assert space.decode(point) == {"y": 2}


def test_a_range_of_one_value_decodes_to_it() -> None:
    space = make_space([Dimension("x", "float", 1.0, 1.0), Dimension("y", "int", 1, 1, log=True)])
    assert space.decode(space.snap(np.array([0.2, 0.9]))) == {"x": 1.0, "y": 1}
    assert space.n_configurations == 1


@pytest.mark.parametrize(
    ("name", "kind", "low", "high", "role"),
    [
        ("learning_rate", "float", 1e-6, 1e-2, "learning_rate"),
        ("lr", "float", 1e-6, 1e-2, "learning_rate"),
        ("training.learningRate", "float", 1e-6, 1e-2, "learning_rate"),
        ("r", "int", 4, 64, "rank"),
        ("LoRA-Rank", "int", 4, 64, "rank"),
        ("alpha", "int", 8, 128, "alpha"),
        ("lora_alpha", "float", 1, 2, "alpha"),
        ("lora_alpha_ratio", "float", 0.5, 4, "alpha_ratio"),
        ("warmup_ratio", "float", 0, 0.2, "warmup"),
        ("per_device_train_batch_size", "int", 1, 32, "batch_size"),
        ("wd", "float", 0, 0.1, "weight_decay"),
        ("num_train_epochs", "int", 1, 5, "steps"),
        ("r", "float", 0.0, 1.0, None),
        ("alpha", "float", 0.0, 1.0, None),
        ("learning_rate", "float", 1, 1000, None),
        ("layers", "int", 1, 12, None),
        ("colsample", "float", 0, 1, None),
    ],
)
def test_roles_by_name_and_range(
    name: str, kind: str, low: float, high: float, role: str | None
) -> None:
    of_lora = Dimension("lora_flavour", "float")
    dimension, _ = make_space([Dimension(name, kind, low, high), of_lora]).dimensions
    assert dimension.role == role


def test_roles_of_choices_and_roles_given_by_the_user() -> None:
    space = make_space(
        [
            Dimension("target_modules", "categorical", choices=("qv", "all-linear")),
            Dimension("r", "categorical", choices=(8, 16, 32)),
            Dimension("lr", "float", 1e-5, 1e-3, log=True),
            Dimension("speed", "float", 1e-5, 1e-3, log=True),
        ],
        roles={"lr": "none", "speed": "learning_rate"},
    )
    assert [d.role for d in space.dimensions] == ["targets", "rank", None, "learning_rate"]


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "complex"},
        {"kind": "categorical"},
        {"kind": "float", "low": 2.0},
        {"kind": "float", "log": True},
    ],
)
def test_impossible_dimensions_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="dimension x"):
        Dimension("x", **bad)


def test_a_range_of_one_value_has_one_place() -> None:
    assert Dimension("x", "float", 1.0, 1.0).grid().tolist() == [0.5]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 10**400])
def test_choices_that_are_no_usual_numbers_have_no_role(odd: float) -> None:
    for name in ("lora_rank", "learning_rate"):
        assert recognise(name, "categorical", 0.0, 1.0, (8, odd)) is None
        assert recognise(name, "categorical", 0.0, 1.0, (odd, 8)) is None
