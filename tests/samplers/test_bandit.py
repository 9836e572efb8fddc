"""What is the bandit's own; what any sampler owes is in ``test_contract.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest

from optuna_lora_rl import BanditSampler
from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError

VARIANTS: list[dict[str, Any]] = [
    {"algorithm": "thompson"},
    {"algorithm": "ucb"},
    {"algorithm": "thompson", "contextual": True},
    {"algorithm": "ucb", "contextual": True},
]


def objective(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    rank = trial.suggest_int("lora_rank", 2, 64)
    targets = trial.suggest_categorical("target_modules", ["qv", "attention", "mlp", "all"])
    batch = trial.suggest_categorical("batch_size", [4, 8, 16, 32])
    decay = trial.suggest_float("weight_decay", 0.0, 0.3)
    penalty = {"qv": 0.3, "attention": 0.2, "mlp": 0.1, "all": 0.0}[targets]
    return float(
        (np.log10(rate) + 3.5) ** 2
        + 0.05 * (np.log2(rank) - 4) ** 2
        + 0.05 * abs(np.log2(batch) - 3)
        + penalty
        + 0.3 * decay
    )


def late_mean(sampler: optuna.samplers.BaseSampler) -> float:
    """Mean value of the last 30 of 60 trials: what the sampler has learnt to play."""
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=60)
    return float(np.median([trial.value for trial in study.trials[30:]]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_learns_what_random_search_does_not(variant: dict[str, Any]) -> None:
    ours = np.mean([late_mean(BanditSampler(seed=seed, **variant)) for seed in range(3)])
    blind = np.mean([late_mean(optuna.samplers.RandomSampler(seed=seed)) for seed in range(3)])
    assert ours < 0.7 * blind, (ours, blind)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ranks_are_powers_of_two_and_no_configuration_comes_twice(variant: dict[str, Any]) -> None:
    study = optuna.create_study(sampler=BanditSampler(seed=0, **variant))
    study.optimize(objective, n_trials=40)
    params = [trial.params for trial in study.trials]
    assert {p["lora_rank"] for p in params} <= {2, 4, 8, 16, 32, 64}
    assert len({p["learning_rate"] for p in params}) <= 7
    assert len({tuple(sorted(p.items())) for p in params[1:]}) == 39


def test_levels_are_the_users_where_given() -> None:
    levels = {"lora_rank": [5, 60], "learning_rate": 3, "target_modules": ["qv", "mlp"]}
    study = optuna.create_study(sampler=BanditSampler(seed=0, levels=levels))
    study.optimize(objective, n_trials=30)
    params = [trial.params for trial in study.trials]
    assert {p["lora_rank"] for p in params} == {5, 60}
    assert {p["target_modules"] for p in params} == {"qv", "mlp"}
    assert {round(p["learning_rate"], 7) for p in params} == {1e-5, 3.162e-4, 1e-2}


def test_a_parameter_of_another_name_gets_its_role_from_the_user() -> None:
    def suggest(trial: optuna.Trial) -> float:
        return float(trial.suggest_int("width_of_update", 2, 64))

    study = optuna.create_study(sampler=BanditSampler(seed=0, roles={"width_of_update": "rank"}))
    study.optimize(suggest, n_trials=12)
    assert {trial.value for trial in study.trials} <= {2, 4, 8, 16, 32, 64}


def test_levels_outside_the_range_are_told_at_the_first_trial() -> None:
    study = optuna.create_study(sampler=BanditSampler(levels={"lora_rank": [128]}))
    with pytest.raises(UserError, match=r"levels of 'lora_rank' are \[128\].*between 2 and 64"):
        study.optimize(objective, n_trials=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "epsilon"}, "algorithm is 'epsilon'"),
        ({"exploration": -1.0}, "exploration is -1.0"),
        ({"exploration": float("nan")}, "exploration is nan"),
        ({"seed": -3}, "seed is -3"),
        ({"roles": {"my_r": "width"}}, "roles: my_r is 'width', but must be one of learning_rate"),
        ({"levels": 1}, "levels of a range is 1"),
        ({"levels": True}, "levels of a range is True"),
        ({"levels": {"lora_rank": "8"}}, "levels of lora_rank is '8'"),
    ],
)
def test_wrong_arguments_are_told_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        BanditSampler(**options)


def test_a_proposal_tells_how_its_levels_have_done() -> None:
    study = optuna.create_study(sampler=BanditSampler(seed=0))
    study.optimize(objective, n_trials=20)
    why = samplers.proposal(study.trials[-1])
    assert why is not None
    assert why["source"] == "thompson"
    assert why["trials_seen"] == 19
    assert why["levels"].keys() == study.trials[-1].params.keys()
    for key, level in why["levels"].items():
        earlier = [trial.params[key] for trial in study.trials[:-1]]
        assert level["value"] == study.trials[-1].params[key]
        # The first trial is proposed parameter by parameter, yet on the same levels.
        assert level["plays"] == earlier.count(level["value"])
        assert 0.0 < level["mean_rank"] < 1.0


def test_several_objectives_are_covered_from_end_to_end() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=BanditSampler(seed=0))

    def trade(trial: optuna.Trial) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        waste = trial.suggest_float("waste", 0, 1) + trial.suggest_float("more_waste", 0, 1)
        return x**2 + waste, (1 - x) ** 2 + waste

    study.optimize(trade, n_trials=60)
    assert {trial.params["x"] for trial in study.best_trials} >= {0.0, 1.0}
    late = [trial.params["waste"] for trial in study.trials[30:]]
    assert np.mean(late) < 0.4
