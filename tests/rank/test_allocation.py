from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import allocation
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import probe
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.allocation import allocate
from optuna_lora_rl.rank.allocation import patterns
from tests.rank.conftest import language_loss

SQUARE = dict.fromkeys("abcd", (64, 64))

weights = st.one_of(st.just(0.0), st.floats(0, 1e9), st.floats(0, 1))
cases = st.lists(
    st.tuples(weights, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12
)


def given_case(drawn: Any) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    names = [f"layer.{i}" for i in range(len(drawn))]
    values = {name: case[0] for name, case in zip(names, drawn, strict=True)}
    return values, {name: case[1:] for name, case in zip(names, drawn, strict=True)}


@settings(max_examples=300, deadline=None)
@given(cases, st.integers(0, 400), st.integers(1, 4), st.none() | st.integers(4, 50))
def test_ranks_sum_to_the_budget_or_it_says_why(
    drawn: Any, budget: int, minimum: int, maximum: int | None
) -> None:
    values, shapes = given_case(drawn)
    high = {name: min(*shape, maximum or 99) for name, shape in shapes.items()}
    low = {name: min(minimum, most) for name, most in high.items()}
    arguments: dict[str, Any] = {"budget": budget, "shapes": shapes}
    arguments |= {"minimum": minimum, "maximum": maximum}
    if not sum(low.values()) <= budget <= sum(high.values()):
        with pytest.raises(UserError, match=f"budget of {budget} ranks is (less|more) than"):
            allocate(values, **arguments)
        return
    found = allocate(values, **arguments)
    assert sum(found.ranks.values()) == budget
    assert found.left == 0
    for name, rank in found.ranks.items():
        assert low[name] <= rank <= high[name]
    for one in values:
        for other in values:
            if values[one] > values[other] and found.ranks[one] < high[one]:
                # More importance never means less rank, but for the bounds and the rounding.
                assert found.ranks[one] >= min(found.ranks[other], high[one]) - 1


@settings(max_examples=300, deadline=None)
@given(cases, st.integers(0, 20000), st.integers(1, 3))
def test_parameters_stay_within_the_budget_and_use_it(
    drawn: Any, budget: int, minimum: int
) -> None:
    values, shapes = given_case(drawn)
    low = {name: min(minimum, *shape) for name, shape in shapes.items()}
    arguments: dict[str, Any] = {"budget": budget, "unit": "parameters", "shapes": shapes}
    if budget < sum(sum(shapes[name]) * low[name] for name in shapes):
        with pytest.raises(UserError, match=f"budget of {budget} parameters is less than"):
            allocate(values, minimum=minimum, **arguments)
        return
    found = allocate(values, minimum=minimum, **arguments)
    used = sum(sum(shapes[name]) * rank for name, rank in found.ranks.items())
    assert used + found.left == budget
    assert found.left >= 0
    for name, rank in found.ranks.items():
        assert low[name] <= rank <= min(shapes[name])
        assert rank == min(shapes[name]) or found.left < sum(shapes[name])


def test_ranks_are_in_proportion_to_importance() -> None:
    found = allocate({"a": 1, "b": 2, "c": 3, "d": 4}, budget=40, shapes=SQUARE)
    assert found.ranks == {"a": 4, "b": 8, "c": 12, "d": 16}


def test_the_largest_remainders_get_what_is_left() -> None:
    found = allocate({"a": 1.4, "b": 1.4, "c": 1.2, "d": 6}, budget=10, shapes=SQUARE)
    assert found.ranks == {"a": 2, "b": 1, "c": 1, "d": 6}


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    found = allocate({"a": 100, "b": 1, "c": 1, "d": 2}, budget=20, shapes=SQUARE, maximum=8)
    assert found.ranks == {"a": 8, "b": 3, "c": 3, "d": 6}


def test_layers_without_importance_keep_the_minimum_while_others_have_room() -> None:
    values = {"a": 0, "b": 0, "c": 1, "d": 3}
    assert allocate(values, budget=10, shapes=SQUARE).ranks == {"a": 1, "b": 1, "c": 2, "d": 6}
    full = allocate(values, budget=24, shapes=SQUARE, maximum=8).ranks
    assert full == {"a": 4, "b": 4, "c": 8, "d": 8}


def test_no_importance_at_all_means_all_alike() -> None:
    assert set(allocate(dict.fromkeys("abcd", 0), budget=12, shapes=SQUARE).ranks.values()) == {3}


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ({}, {}, "no layers"),
        ({"a": float("nan")}, {}, "importance of a is nan"),
        ({"a": -1}, {}, "importance of a is -1"),
        ({"z": 1}, {}, "no layer 'z'"),
        ({"a": 1}, {"minimum": 0}, "at least 1, not 0"),
        ({"a": 1}, {"minimum": 4, "maximum": 2}, "maximum rank 2 is less"),
        ({"a": 1, "b": 1}, {"budget": 1}, "less than the 2"),
        ({"a": 1}, {"budget": 65}, "more than the 64"),
    ],
)
def test_bad_input_is_one_sentence(values: Any, options: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        allocate(values, **{"budget": 8, "shapes": SQUARE, **options})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_gives_each_layer_its_rank_at_the_scale_of_the_reference(
    model: Any, adapted: Callable[..., Any], use_rslora: bool
) -> None:
    shapes = layers.shapes_of(model)
    names = [name for name in shapes if name.endswith(("q_proj", "down_proj"))]
    ranks = dict(zip(names, (1, 2, 5, 8), strict=True))
    said = patterns(ranks, rank=4, alpha=8, use_rslora=use_rslora)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*did not match.*")
        peft = adapted(
            rank_pattern=said.rank_pattern,
            alpha_pattern=said.alpha_pattern,
            use_rslora=use_rslora,
        )
    found = layers.lora_layers(peft)
    assert {name: layer.r["default"] for name, layer in found.items()} == ranks
    for layer in found.values():
        assert layer.scaling["default"] == pytest.approx(4 if use_rslora else 2)


def test_a_pattern_means_one_module_only(model: Any) -> None:
    import re

    # As PEFT reads it: a regular expression for the end of a path.
    key = layers.exactly("layers.1.q")
    assert re.match(rf"(.*\.)?({key})$", "layers.1.q")
    for other in ("decoder.layers.1.q", "layers.11q", "layersx1.q", "layers.1.qq"):
        assert not re.match(rf"(.*\.)?({key})$", other)


def test_importances_of_a_model(model: Any, ids: Any) -> None:
    shapes = layers.shapes_of(model)
    weight = allocation.importance_of_spectra(spectrum.of_weights(model))
    gradient = allocation.importance_of_gradients(probe.gradients(model, [ids], language_loss))
    inputs = probe.activations(model, [ids], lambda model, batch: model(batch))
    activation = allocation.importance_of_activations(inputs, 56)
    assert sum(activation.values()) == 56
    for values in (weight, gradient, activation, allocation.uniform_importance(shapes)):
        assert list(values) == list(shapes)
        assert sum(allocate(values, budget=56, shapes=shapes).ranks.values()) == 56
    # Query, key and value read the same input.
    block = "model.layers.0.self_attn"
    assert abs(activation[f"{block}.q_proj"] - activation[f"{block}.v_proj"]) <= 1


def test_importance_grows_with_rank_and_size() -> None:
    import torch

    spectra = {
        "small": spectrum.of_matrix(torch.diag(torch.tensor([1.0, 1.0, 0.0]))),
        "large": spectrum.of_matrix(torch.diag(torch.tensor([9.0, 9.0, 0.0]))),
        "full": spectrum.of_matrix(9 * torch.eye(3)),
    }
    found = allocation.importance_of_spectra(spectra)
    assert found["small"] == pytest.approx(2 * 0.6931, rel=1e-3)
    assert found["small"] < found["large"] < found["full"]
    assert allocation.importance_of_gradients(spectra)["full"] == pytest.approx(243)
