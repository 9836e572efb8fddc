"""A sampler that knows what the score is charged."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl import RLSampler
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.known_cost import KnownCost

SPACE = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "lora_rank": IntDistribution(1, 256, log=True),
    "lora_dropout": FloatDistribution(0.0, 0.3),
}


def _cost(params: Mapping[str, Any]) -> float:
    return 0.02 * float(params["lora_rank"]) ** 0.5


def _quality(params: Mapping[str, Any]) -> float:
    off = math.log10(params["learning_rate"]) + 2.5
    return 1.0 - 0.4 * off * off - 0.3 * params["lora_dropout"] - 0.05 / params["lora_rank"]


def _scores(sampler: RLSampler, direction: str = "maximize", trials: int = 10) -> list[float]:
    study = optuna.create_study(sampler=sampler, direction=direction)
    sign = 1.0 if direction == "maximize" else -1.0
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, sign * (_quality(trial.params) - _cost(trial.params)))
    return [sign * trial.values[0] for trial in study.trials]


def test_it_asks_once_for_what_is_the_same() -> None:
    asked = []

    def cost(params: Mapping[str, Any]) -> float:
        asked.append(params["lora_rank"])
        return float(params["lora_rank"]) + params["fixed"]

    space, points = space_of(SPACE), np.random.default_rng(0).random((300, 3))
    points[:, 2] = np.round(points[:, 2], 1)
    points = space.snap(points)
    known = pickle.loads(pickle.dumps(KnownCost(_cost)))
    ranks = [space.decode(point)["lora_rank"] for point in points]
    assert known.at(space, points, {}).tolist() == [_cost({"lora_rank": r}) for r in ranks]
    found = KnownCost(cost).at(space, points, {"fixed": 0.5})
    assert found.tolist() == [rank + 0.5 for rank in ranks]
    # Once more than there are: when it was not yet known that the rank is read.
    assert len(asked) == len(set(ranks)) + 1


def test_it_finds_out_what_is_read_only_here_and_there() -> None:
    def cost(params: Mapping[str, Any]) -> float:
        return params["lora_dropout"] if params["lora_rank"] > 16 else 0.0

    space, points = space_of(SPACE), np.random.default_rng(1).random((200, 3))
    points = space.snap(points)
    expected = [cost(space.decode(point)) for point in points]
    assert KnownCost(cost).at(space, points, {}).tolist() == expected


def test_what_is_charged_need_not_be_learnt() -> None:
    # Means over seeds of the best of three to six trials.
    def regret(**known: Any) -> float:
        runs = [_scores(RLSampler(seed=s, learned=False, **known), trials=6) for s in range(4)]
        return float(np.mean([1.0 - max(run[:k]) for run in runs for k in (3, 4, 5, 6)]))

    assert regret(cost=_cost) < regret()


def test_minimised_losses_are_charged_on_top() -> None:
    up = _scores(RLSampler(seed=0, cost=_cost))
    down = _scores(RLSampler(seed=0, cost=_cost), "minimize")
    assert down == pytest.approx(up, abs=1e-9)


def test_bad_functions_get_a_sentence() -> None:
    with pytest.raises(UserError, match="must be a function"):
        RLSampler(cost=3.0)  # type: ignore[arg-type]
    for cost, sentence in (
        (lambda params: params["nothing"], "cost raised KeyError for .*lora_rank"),
        (lambda params: math.nan, "cost gave nan"),
        (lambda params: "much", "cost gave 'much'"),
    ):
        with pytest.raises(UserError, match=sentence):
            _scores(RLSampler(seed=0, cost=cost), trials=2)
    study = optuna.create_study(sampler=RLSampler(cost=_cost), directions=["maximize"] * 2)
    study.tell(study.ask(SPACE), [0.0, 1.0])
    with pytest.raises(UserError, match="several"):
        study.ask(SPACE)
