"""Optimisers of other libraries."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl.errors import UserError
from studies.comparison import outside

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "rank": IntDistribution(2, 64, log=True),
    "on": CategoricalDistribution([True, False]),
}


def ask_and_tell(sampler: optuna.samplers.BaseSampler, trials: int) -> list[dict]:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(trials):
        trial = study.ask(SPACE)
        if number == 1:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, trial.params["lr"])
    return [trial.params for trial in study.trials]


def smac(seed: int) -> optuna.samplers.BaseSampler:
    pytest.importorskip("smac")
    return outside.SmacSampler(SPACE, seed, 12)


def test_it_learns_and_stays_in_the_space() -> None:
    first, again = (ask_and_tell(smac(0), 6) for _ in range(2))
    assert first == again
    assert first[0] != ask_and_tell(smac(1), 1)[0]
    assert len({str(params) for params in first}) == 6
    assert type(first[0]["rank"]) is int and type(first[0]["on"]) is bool


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="sampler 'smac' needs the package smac"):
        outside.SmacSampler(SPACE, 0, 5)
