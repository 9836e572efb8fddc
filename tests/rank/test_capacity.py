from __future__ import annotations

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import capacity


def test_counts_of_a_square_layer() -> None:
    counted = capacity.of_layer((4096, 4096), 8)
    assert counted.parameters == 65536
    assert counted.compression == 256
    assert (counted.expressible, counted.largest) == (8, 4096)


def test_more_rank_than_the_layer_has_expresses_no_more() -> None:
    counted = capacity.of_layer((10, 4), 6)
    assert (counted.expressible, counted.coverage) == (4, 1.0)
    assert counted.compression < 1


@pytest.mark.parametrize("shape", [(4096, 4096), (10, 4), (3, 1), (64, 32)])
def test_up_to_break_even_an_adapter_is_smaller(shape: tuple[int, int]) -> None:
    rank, dense = capacity.break_even(shape), shape[0] * shape[1]
    assert rank * sum(shape) < dense <= (rank + 1) * sum(shape)


def test_layers_add_up_and_are_drawn() -> None:
    shapes = {"a": (10, 4), "b": (6, 6)}
    counted = capacity.over_ranks(shapes, [4, 1, 2])
    assert [one.parameters for one in counted] == [104, 26, 52]
    assert counted[0].dense == 76
    drawn = capacity.figure(counted)
    assert [list(trace.x) for trace in drawn.data] == [[1, 2, 4]] * 3
    assert list(drawn.data[0].y) == [26, 52, 104]
    said = drawn.layout.annotations[-1]
    # Where compression is 1.
    assert (said.text, said.y) == ("as large as the weights", 0)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        capacity.of_layer((2, 2), 0)
    with pytest.raises(UserError, match="no layers"):
        capacity.of_layers({}, 1)
    with pytest.raises(UserError, match="no ranks"):
        capacity.over_ranks({"a": (2, 2)}, [])
