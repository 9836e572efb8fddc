from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from typing import Any

import optuna
import pytest

from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from tests.samplers.subjects import params_of
from tests.samplers.subjects import suggest_plain


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_tunes_reproducibly(name: str) -> None:
    runs = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("error", FutureWarning)
            sampler = samplers.create(name, seed=3)
        study = optuna.create_study(sampler=sampler)
        study.optimize(suggest_plain, n_trials=4)
        runs.append(params_of(study))
    assert runs[0] == runs[1]


def test_options_reach_the_sampler() -> None:
    levels = {"x": [0.25, 0.5]}
    sampler = samplers.create("bandit", seed=1, options={"levels": levels, "algorithm": "ucb"})
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=4)
    assert {params["x"] for params in params_of(study)} == {0.25, 0.5}
    assert samplers.proposal(study.trials[-1])["source"] == "ucb"  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "seed", "options", "said"),
    [
        ("tep", 0, {}, ["'tep'", "did you mean 'tpe'", "rl, bandit"]),
        ("tpe", -1, {}, ["seed", "-1"]),
        ("tpe", "7", {}, ["seed", "'7'"]),
        ("random", True, {}, ["seed", "True"]),
        ("tpe", 0, {"n_startup_trial": 1}, ["'n_startup_trial'", "mean 'n_startup_trials'"]),
        ("tpe", 0, {"n_startup_trials": -1}, ["n_startup_trials", "at least 0"]),
        ("tpe", 0, {"prior_weight": 2.0}, ["'prior_weight'", "allowed"]),
        ("tpe", 0, {"gamma": 3}, ["'gamma'", "allowed"]),
        ("tpe", 0, {"group": True, "multivariate": False}, ["group", "multivariate"]),
        ("gp", 0, {"deterministic_objective": "yes"}, ["'yes'", "true or false"]),
        ("qmc", 0, {"qmc_type": "hammersley"}, ["hammersley", "sobol"]),
        ("nsgaii", 0, {"population_size": 1}, ["population_size", "at least 2"]),
        ("random", 0, {"n_startup_trials": 1}, ["'n_startup_trials'", "random"]),
        ("bandit", 0, {"algorithm": "greedy"}, ["'greedy'", "'thompson' or 'ucb'"]),
        ("bandit", 0, {"levels": 1}, ["levels", "at least 2"]),
        ("bandit", 0, {"levels": {"lora_rank": []}}, ["lora_rank", "list of values"]),
        ("bandit", 0, {"seed": 3}, ["'seed'", "twice"]),
        ("rl", 0, {"n_trials": 0}, ["n_trials", "at least 1"]),
        ("rl", 0, {"wieghts": "x"}, ["'wieghts'", "mean 'weights'"]),
        ("cmaes", 0, [1], ["mapping", "[1]"]),
    ],
)
def test_bad_input_is_one_sentence(name: str, seed: Any, options: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        samplers.create(name, seed=seed, options=options)
    sentence = str(caught.value)
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'optuna_lora_rl\[cmaes\]'"):
        samplers.create("cmaes")
    assert importlib.util.find_spec("optuna") is not None


def test_cmaes_says_that_it_has_one_objective() -> None:
    samplers.check("cmaes", n_objectives=1)
    samplers.check("bandit", n_objectives=2)
    with pytest.raises(UserError, match="'cmaes' works with one objective"):
        samplers.check("cmaes", n_objectives=2)


def test_naming_a_sampler_loads_neither_torch_nor_the_trainers() -> None:
    script = (
        "import sys; from optuna_lora_rl import samplers, pruners; "
        "samplers.create('bandit'); samplers.create('tpe'); pruners.create('median'); "
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
