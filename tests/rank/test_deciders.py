from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank.deciders import GradientSpectrum
from optuna_lora_rl.rank.deciders import Limit
from optuna_lora_rl.rank.deciders import LossCurve
from optuna_lora_rl.rank.deciders import Steps


def fed(
    decider: LossCurve, losses: Any, ranks: dict[str, int]
) -> list[tuple[int, dict[str, int]]]:
    """Feeds losses, applies what is decided, and returns when what changed."""
    changes = []
    for step, loss in enumerate(losses):
        new = decider.update(loss, ranks)
        assert set(decider.reasons) == set(new)
        if new:
            changes.append((step, new))
            ranks = {**ranks, **new}
    return changes


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 100))
def test_steps_stay_within_bounds_and_move(rank: int, minimum: int, more: int) -> None:
    steps = Steps(minimum=minimum, maximum=minimum + more)
    grown, shrunk = steps.taken(rank, "grow"), steps.taken(rank, "shrink")
    assert grown > rank or rank >= steps.maximum
    assert shrunk < rank or rank <= minimum
    assert rank <= grown <= max(rank, steps.maximum)
    assert min(rank, minimum) <= shrunk <= rank


def test_steps_are_those_of_the_factors() -> None:
    steps = Steps()
    assert [steps.taken(rank, "grow") for rank in (1, 2, 8, 60)] == [2, 3, 12, 64]
    assert [steps.taken(rank, "shrink") for rank in (1, 2, 10, 64)] == [1, 1, 8, 51]


def test_a_plateau_grows_all_layers_after_patience() -> None:
    decider = LossCurve(window=4, steps=Steps(patience=2))
    changes = fed(decider, [1.0] * 10, {"a": 4, "b": 8})
    # A window fills, one more loss for patience; then both anew.
    assert changes == [(4, {"a": 6, "b": 12}), (9, {"a": 9, "b": 18})]


def test_an_oscillation_shrinks() -> None:
    decider = LossCurve(window=4, steps=Steps(patience=1))
    changes = fed(decider, [1.0, 1.3, 1.0, 1.3], {"a": 10, "b": 1})
    assert changes == [(3, {"a": 8})]


def test_a_falling_or_rising_loss_changes_nothing() -> None:
    for losses in ([1 - 0.02 * i for i in range(20)], [1 + 0.02 * i for i in range(20)]):
        assert fed(LossCurve(), losses, {"a": 4}) == []


def test_the_last_verdict_is_explained() -> None:
    decider = LossCurve(window=3, steps=Steps(patience=1))
    for _ in range(3):
        decider.update(2.0, {"a": 4})
    assert "stands still" in decider.reasons["a"]
    assert decider.update(float("nan"), {"a": 6}) == {}
    assert decider.reasons == {}


def test_at_the_bounds_nothing_changes() -> None:
    decider = LossCurve(window=3, steps=Steps(maximum=4, patience=1))
    assert fed(decider, [1.0] * 9, {"a": 4}) == []


def gradients(rank: int, count: int, noise: float = 0.0, fade: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(0)
    signal = torch.linalg.qr(torch.randn(20, rank, generator=generator)).Q @ torch.eye(rank, 16)
    for i in range(count):
        wild = torch.linalg.qr(torch.randn(20, 16, generator=generator)).Q
        yield {"a": fade**i * ((1 - noise) * signal + noise * wild)}


def judged(decider: GradientSpectrum, seen: Any, rank: int) -> list[int]:
    ranks = [rank]
    for gradient in seen:
        ranks.append(decider.update(gradient, {"a": ranks[-1]}).get("a", ranks[-1]))
    return ranks


def test_a_layer_grows_to_what_its_gradient_needs() -> None:
    ranks = judged(GradientSpectrum(window=2, steps=Steps(patience=1)), gradients(8, 12), 2)
    # 95% of 8 equal directions are 8 of them.
    assert ranks == [2, 2, 3, 3, 5, 5, 8, 8, 8, 8, 8, 8, 8]


def test_a_layer_shrinks_to_what_its_gradient_needs() -> None:
    decider = GradientSpectrum(window=2, slack=0.9, steps=Steps(patience=1))
    assert min(judged(decider, gradients(3, 20), 10)) == 3


def test_a_gradient_without_direction_or_that_fades_grows_nothing() -> None:
    for seen in (gradients(8, 10, noise=1.0), gradients(8, 10, fade=0.5)):
        decider = GradientSpectrum(window=2, consistent=0.5, steps=Steps(patience=1))
        assert set(judged(decider, seen, 2)) == {2}


def test_a_layer_without_gradient_keeps_its_rank() -> None:
    seen = [{"a": torch.zeros(4, 4)}] * 8
    assert set(judged(GradientSpectrum(window=2, steps=Steps(patience=1)), seen, 4)) == {4}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Steps(grow=1.0), "grow is a factor over 1"),
        (lambda: Steps(shrink=1.0), "shrink is a factor between"),
        (lambda: Steps(minimum=5, maximum=4), "not 5 and 4"),
        (lambda: Steps(patience=0), "patience is at least 1"),
        (lambda: LossCurve(window=2), "at least 3 losses"),
        (lambda: LossCurve(calm=0.5, oscillation=0.1), "calm <= oscillation"),
        (lambda: GradientSpectrum(energy=1.0), "energy is a share"),
        (lambda: GradientSpectrum(slack=0.0), "slack is a share"),
        (lambda: GradientSpectrum(window=1), "at least 2 gradients"),
    ],
)
def test_bad_settings_are_one_sentence(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_growing_by_loss_ends_at_the_limit(more: int, a: int, b: int) -> None:
    limit = Limit(2 * a + b + more, {"a": a, "b": b})
    decider = LossCurve(window=3, steps=Steps(patience=1), limit=limit)
    ranks = {"a": 2, "b": 1}
    for _, new in fed(decider, [1.0] * 40, ranks):
        ranks |= new
    assert limit.room(ranks) >= 0
    # Ranks grow alike: there is no room for one more of each.
    assert limit.room({"a": ranks["a"] + 1, "b": ranks["b"] + 1}) < 0 or max(ranks.values()) == 64


def test_what_the_gradients_ask_for_is_met_by_energy_within_the_limit() -> None:
    limit = Limit(20, {"weak": 2, "strong": 2})
    decider = GradientSpectrum(window=2, steps=Steps(grow=3, patience=1), limit=limit)
    ranks = {"weak": 3, "strong": 3}
    for seen in gradients(8, 8):
        new = decider.update({"weak": seen["a"], "strong": 2 * seen["a"]}, ranks)
        assert set(decider.reasons) == set(new)
        ranks |= new
        assert limit.room(ranks) >= 0
    assert ranks == {"weak": 3, "strong": 7}


def test_shrinking_makes_room_for_others() -> None:
    limit = Limit(13, {"large": 1, "small": 1})
    decider = GradientSpectrum(window=2, steps=Steps(patience=1), limit=limit)
    ranks = {"large": 10, "small": 3}
    for wide, narrow in zip(gradients(8, 3), gradients(1, 3), strict=True):
        ranks |= decider.update({"large": narrow["a"], "small": wide["a"]}, ranks)
    assert ranks == {"large": 8, "small": 5}
