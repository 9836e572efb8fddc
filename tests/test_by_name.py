from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import pytest

from optuna_lora_rl import by_name
from optuna_lora_rl.errors import UserError


class Oven:
    def __init__(
        self,
        *,
        seed: int | None = None,
        degrees: float = 200.0,
        mode: Literal["fan", "grill"] = "fan",
        shelves: Mapping[str, Sequence[float]] | int | None = None,
        bell: Callable[[], None] | None = None,
    ) -> None:
        if degrees > 300:
            raise ValueError("An oven\nmelts at 300.")
        self.settings = (seed, degrees, mode, shelves)


def build(**options: Any) -> Oven:
    return by_name.build("oven", Oven, options, given={"seed": 1}, limits={"degrees": (0, 999)})


def test_options_of_every_sayable_type_arrive() -> None:
    assert build().settings == (1, 200.0, "fan", None)
    shelves = {"top": [1, 2]}
    oven = build(degrees="1.5e2", mode="grill", shelves=shelves)
    assert oven.settings == (1, 150.0, "grill", shelves)
    assert build(shelves=3).settings[3] == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"mod": "fan"},
            "oven has no option 'mod' (did you mean 'mode'?); "
            "allowed: seed, degrees, mode, shelves",
        ),
        ({"bell": print}, "oven has no option 'bell'; allowed: seed, degrees, mode, shelves"),
        ({"mode": "steam"}, "oven: option 'mode' is 'steam', but must be 'fan' or 'grill'"),
        (
            {"shelves": "top"},
            "oven: option 'shelves' is 'top', but must be a mapping or a whole number or null",
        ),
        (
            {"degrees": -1},
            "oven: option 'degrees' is -1, but must be a number, between 0 and 999",
        ),
        ({"degrees": None}, "oven: option 'degrees' is None, but must be a number, between 0 a"),
        ({"degrees": "hot"}, "oven: option 'degrees' is 'hot', but must be a number, between 0"),
        ({"degrees": 400}, "oven: An oven melts at 300"),
        ({"seed": 2}, "oven: option 'seed' is given twice"),
    ],
)
def test_bad_options_are_one_clear_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**options)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_bug_in_the_constructor_stays_a_bug() -> None:
    def broken(*, size: int = 1) -> None:
        raise RuntimeError("not the user's fault")

    with pytest.raises(RuntimeError):
        by_name.build("broken", broken, {"size": 2})
