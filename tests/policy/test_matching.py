from __future__ import annotations

import math

import numpy as np
import pytest

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.matching import place


def _space(*dimensions: Dimension) -> Space:
    return make_space(dimensions)


LR = Dimension("learning_rate", "float", 1e-5, 1e-2, log=True)
RANK = Dimension("lora_rank", "int", 4, 64, log=True)
ALPHA = Dimension("lora_alpha", "int", 4, 256, log=True)
RATIO = Dimension("alpha_ratio", "float", 0.25, 8.0, log=True)
TARGETS = Dimension("target_modules", "categorical", choices=("qv", "attention", "all-linear"))


def test_values_are_matched_by_name_then_by_role_and_compared_as_values() -> None:
    target = _space(LR, RANK, TARGETS, Dimension("x", "float", 0.0, 10.0))
    source = _space(
        Dimension("lr", "float", 0.0, 0.02),
        Dimension("lora_rank", "categorical", choices=(8, 16, 32)),
        TARGETS,
        Dimension("y", "float", 0.0, 10.0),
    )
    params = [{"lr": 1e-3, "lora_rank": 16, "target_modules": "attention", "y": 5.0}]
    points, shared = place(target, source, params)
    assert target.decode(points[0]) == {
        "learning_rate": pytest.approx(1e-3),
        "lora_rank": 16,
        "target_modules": "attention",
    }
    assert shared.tolist() == [True, True, True, False]


def test_alpha_and_its_ratio_to_the_rank_are_the_same_thing() -> None:
    by_alpha, by_ratio = _space(RANK, ALPHA), _space(RANK, RATIO)
    points, shared = place(by_alpha, by_ratio, [{"lora_rank": 16, "alpha_ratio": 2.0}])
    assert by_alpha.decode(points[0]) == {"lora_rank": 16, "lora_alpha": 32}
    assert shared.all()
    points, shared = place(by_ratio, by_alpha, [{"lora_rank": 16, "lora_alpha": 64}])
    assert by_ratio.decode(points[0])["alpha_ratio"] == pytest.approx(4.0)
    assert shared.all()


def test_what_lies_outside_keeps_its_side_and_another_regime_is_not_shared() -> None:
    target, source = _space(LR), _space(Dimension("learning_rate", "float", 1e-7, 1.0, log=True))
    points, shared = place(target, source, [{"learning_rate": v} for v in (1e-6, 1e-4, 3e-2)])
    assert points[0, 0] < 0 < points[1, 0] < 1 < points[2, 0]
    assert shared.all()
    points, shared = place(target, source, [{"learning_rate": v} for v in (1e-7, 1e-6, 1.0)])
    assert np.all((points >= -1) & (points <= 2))
    assert not shared.any()


def test_numbers_find_their_place_between_numeric_choices() -> None:
    target = _space(Dimension("batch_size", "categorical", choices=(8, 16, 32)))
    source = _space(Dimension("batch_size", "int", 1, 256, log=True))
    values = (1, 8, 12, 32, 256)
    points, _ = place(target, source, [{"batch_size": v} for v in values])
    u = points[:, 0]
    assert np.all(np.diff(u) > 0)
    assert u[1] == pytest.approx(1 / 6)
    assert u[3] == pytest.approx(5 / 6)
    assert u[0] < 0 < 1 < u[4]


def test_unknown_choices_differ_from_every_choice_and_modules_match_by_coverage() -> None:
    of_lora = Dimension("lora_flavour", "float")
    optimizer = Dimension("optimizer", "categorical", choices=("adamw", "sgd"))
    target = _space(TARGETS, optimizer, of_lora)
    source = _space(
        Dimension("targets", "categorical", choices=("all", "attn")),
        Dimension("optimizer", "categorical", choices=("adamw", "lion", "muon")),
        of_lora,
    )
    params = [
        {"targets": "all", "optimizer": "lion"},
        {"targets": "attn", "optimizer": "muon"},
        {"targets": "all", "optimizer": "adamw"},
    ]
    points, shared = place(target, source, params)
    assert [target.dimensions[0].decode(u) for u in points[:, 0]] == [
        "all-linear",
        "attention",
        "all-linear",
    ]
    assert points[0, 1] < 0 and points[1, 1] < 0 and points[0, 1] != points[1, 1]
    assert points[2, 1] == target.dimensions[1].encode("adamw")
    assert shared[:2].all()


def test_absent_and_odd_values_are_unknown() -> None:
    points, shared = place(_space(LR), _space(LR), [{}, {"learning_rate": 0.0}])
    assert all(math.isnan(u) for u in points[:, 0])
    assert not shared.any()
