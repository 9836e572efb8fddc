"""What any Optuna sampler owes: Optuna's own suite, reproducibility, workers side by side.

How the samplers take every kind of trial is in ``test_contract_trials.py``.
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase

from optuna_lora_rl import samplers
from tests.samplers.subjects import FACTORIES
from tests.samplers.subjects import SamplerFactory
from tests.samplers.subjects import params_of
from tests.samplers.subjects import suggest_lora
from tests.samplers.subjects import suggest_plain
from tests.samplers.subjects import tell
from tests.samplers.subjects import trajectory


class TestBasic(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self, make: SamplerFactory) -> Callable[[], BaseSampler]:
        return make


class TestRelative(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self, make: SamplerFactory) -> Callable[[], BaseSampler]:
        return make


class TestMultiObjective(MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self, make: SamplerFactory) -> Callable[[], BaseSampler]:
        return make


# Reproducible


def test_one_seed_gives_one_trajectory_and_another_another(name: str) -> None:
    assert trajectory(name, seed=3) == trajectory(name, seed=3)
    assert trajectory(name, seed=3) != trajectory(name, seed=4)


def test_without_a_seed_two_samplers_differ(make: SamplerFactory) -> None:
    studies = [optuna.create_study(sampler=make()) for _ in range(2)]
    for study in studies:
        tell(study, suggest_plain, 6)
    assert params_of(studies[0]) != params_of(studies[1])


def _all_trajectories() -> dict[str, list[dict[str, Any]]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return {name: trajectory(name, seed=5) for name in FACTORIES}


@pytest.fixture(scope="module")
def elsewhere() -> list[dict[str, list[dict[str, Any]]]]:
    """All trajectories as two new processes with other hash seeds have them."""
    found = []
    for hash_seed in ("1", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", hash_seed)
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found.append(pool.submit(_all_trajectories).result())
    return found


def test_another_process_finds_the_same(
    name: str, elsewhere: list[dict[str, list[dict[str, Any]]]]
) -> None:
    here = trajectory(name, seed=5)
    assert [there[name] for there in elsewhere] == [here, here]


def test_reseeded_copies_part_ways(make: SamplerFactory) -> None:
    sampler = make(seed=0)
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    studies = [optuna.create_study(sampler=copy) for copy in copies]
    for study in studies:
        study.sampler.reseed_rng()
        tell(study, suggest_plain, 6)
    assert params_of(studies[0]) != params_of(studies[1])


@pytest.mark.parametrize("suggest", [suggest_lora, suggest_plain])
@pytest.mark.parametrize("how", ["pickled", "new"])
def test_a_study_goes_on_with_a_pickled_or_a_new_sampler_as_if_never_stopped(
    make: SamplerFactory, how: str, suggest: Callable[[optuna.Trial], float]
) -> None:
    whole = optuna.create_study(sampler=make(seed=1))
    tell(whole, suggest, 10)
    first = optuna.create_study(sampler=make(seed=1))
    tell(first, suggest, 6)
    sampler = make(seed=1) if how == "new" else pickle.loads(pickle.dumps(first.sampler))
    second = optuna.load_study(
        study_name=first.study_name, storage=first._storage, sampler=sampler
    )
    tell(second, suggest, 4)
    assert params_of(second) == params_of(whole)


@pytest.mark.parametrize("suggest", [suggest_lora, suggest_plain])
def test_an_ask_leaves_everybody_elses_random_numbers_alone(
    make: SamplerFactory, suggest: Callable[[optuna.Trial], float]
) -> None:
    def states() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()

    before = states()
    study = optuna.create_study(sampler=make())
    tell(study, suggest, 7)
    assert states() == before


def test_deterministic_torch_settings_and_threads_are_left_alone(make: SamplerFactory) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = settings()
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 4)
    assert settings() == before


# Values


def test_proposed_values_are_plain_python(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 6)
    wanted = {
        "learning_rate": float,
        "lora_rank": int,
        "lora_dropout": float,
        "target_modules": str,
    }
    for trial in study.trials:
        assert {key: type(value) for key, value in trial.params.items()} == wanted


def test_every_proposal_says_where_it_comes_from(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    tell(study, suggest_lora, 6)
    for trial in study.trials:
        why = samplers.proposal(trial)
        assert why is not None
        assert isinstance(why["source"], str)
    study.enqueue_trial({"learning_rate": 1e-3})
    other = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    tell(other, suggest_plain, 1)
    assert samplers.proposal(other.trials[0]) is None


def test_objectives_without_parameters_or_with_one_value_each_run(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    study.optimize(lambda trial: 1.0, n_trials=3)
    study.optimize(lambda trial: trial.suggest_int("one", 1, 1), n_trials=3)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert len(study.trials) == 9


@pytest.mark.parametrize(
    "distribution",
    [
        optuna.distributions.FloatDistribution(1e-12, 1e12, log=True),
        optuna.distributions.FloatDistribution(-1e308 / 4, 1e308 / 4),
        optuna.distributions.FloatDistribution(0.0, 5e-324),
        optuna.distributions.FloatDistribution(0.1, 0.7, step=0.25),
        optuna.distributions.IntDistribution(-(2**53), 2**53),
        optuna.distributions.IntDistribution(1, 10**9, log=True),
        optuna.distributions.IntDistribution(3, 3 + 7 * 100, step=7),
        optuna.distributions.CategoricalDistribution([None, True, 1.5, "a"]),
        optuna.distributions.CategoricalDistribution([f"c{i}" for i in range(60)]),
    ],
    ids=lambda distribution: str(distribution)[:60],
)
def test_odd_ranges(
    make: SamplerFactory, distribution: optuna.distributions.BaseDistribution
) -> None:
    space = {"odd": distribution, "x": optuna.distributions.FloatDistribution(0, 1)}
    study = optuna.create_study(sampler=make(seed=0))
    for i in range(6):
        trial = study.ask(space)
        assert distribution._contains(distribution.to_internal_repr(trial.params["odd"]))
        study.tell(trial, float(i % 3))


# Side by side


def test_two_threads_share_one_sampler(make: SamplerFactory) -> None:
    study = optuna.create_study(sampler=make(seed=0))
    study.optimize(suggest_plain, n_trials=16, n_jobs=2)
    assert len(study.trials) == 16
    assert all(trial.state.is_finished() for trial in study.trials)


@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("n_finished", [0, 5])
def test_workers_with_the_same_seed_do_not_propose_the_same(
    make: SamplerFactory, database: bool, n_finished: int, tmp_path: Path
) -> None:
    storage = optuna.storages.get_storage(
        f"sqlite:///{tmp_path}/study.db" if database else optuna.storages.InMemoryStorage()
    )
    first = optuna.create_study(storage=storage, sampler=make(seed=0), study_name="shared")
    tell(first, suggest_lora, n_finished)
    workers = [
        optuna.load_study(study_name="shared", storage=storage, sampler=make(seed=0))
        for _ in range(2)
    ]
    for i in range(6):
        trial = workers[i % 2].ask()
        suggest_lora(trial)
    asked = params_of(first)[n_finished:]
    assert len({tuple(sorted(params.items())) for params in asked}) == 6


def test_a_proposal_is_seen_by_others_before_the_objective_has_asked_for_all_of_it(
    make: SamplerFactory,
) -> None:
    # Only six configurations exist, and five are taken: two of them by trials that have asked
    # for no more than their first parameter.
    def suggest(trial: optuna.Trial) -> float:
        return trial.suggest_int("a", 1, 3) + trial.suggest_int("b", 1, 2)

    study = optuna.create_study(sampler=make(seed=0))
    for a, b in ((1, 1), (2, 2), (3, 1)):
        study.enqueue_trial({"a": a, "b": b})
        study.optimize(suggest, n_trials=1)
    trials = [study.ask() for _ in range(3)]
    for trial in trials:
        trial.suggest_int("a", 1, 3)
    for trial in trials:
        trial.suggest_int("b", 1, 2)
    assert len({tuple(sorted(params.items())) for params in params_of(study)}) == 6
