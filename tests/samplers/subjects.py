"""The samplers under test, and the studies that they are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler

import optuna_lora_rl
from optuna_lora_rl import BanditSampler

SamplerFactory = Callable[..., BaseSampler]

FACTORIES: dict[str, SamplerFactory] = {
    "rl": lambda **options: optuna_lora_rl.RLSampler(**options),
    "rl-network-off": lambda **options: optuna_lora_rl.RLSampler(learned=False, **options),
    "thompson": BanditSampler,
    "linear-ucb": lambda **options: BanditSampler(algorithm="ucb", contextual=True, **options),
}


def suggest_lora(trial: optuna.Trial) -> float:
    """A space of every kind of parameter, under LoRA's names; smaller is better."""
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
    rank = trial.suggest_int("lora_rank", 2, 64, log=True)
    dropout = trial.suggest_float("lora_dropout", 0.0, 0.5, step=0.05)
    targets = trial.suggest_categorical("target_modules", ["qv", "mlp", "all-linear"])
    penalty = {"qv": 0.2, "mlp": 0.1, "all-linear": 0.0}[targets]
    return abs(rate - 1e-3) + abs(rank - 16) / 64 + dropout + penalty


def suggest_plain(trial: optuna.Trial) -> float:
    """A space that has nothing to do with LoRA, with a conditional part."""
    x = trial.suggest_float("x", -3, 3)
    y = trial.suggest_int("y", -10, 10)
    z = trial.suggest_float("z", 0.0, 1.0)
    if trial.suggest_categorical("deep", [True, False]):
        return x**2 + abs(y) + z + trial.suggest_float("depth", 0, 1)
    return x**2 + abs(y) + z


def params_of(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def trajectory(name: str, seed: int, n_trials: int = 8) -> list[dict[str, Any]]:
    """What a sampler proposes on the two spaces, with failures and pruned trials in between."""
    found = []
    for suggest in (suggest_lora, suggest_plain):
        study = optuna.create_study(sampler=FACTORIES[name](seed=seed))
        tell(study, suggest, n_trials)
        found += params_of(study)
    return found


def tell(study: optuna.Study, suggest: Callable[[optuna.Trial], float], n_trials: int) -> None:
    """Go on for ``n_trials``; every fourth trial fails, every fifth is pruned."""
    for _ in range(n_trials):
        trial = study.ask()
        value = suggest(trial)
        if trial.number % 4 == 3:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif trial.number % 5 == 4:
            trial.report(value, 1)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)
