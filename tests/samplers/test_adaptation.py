from __future__ import annotations

import math
import pickle

import optuna
import pytest
import torch

from optuna_lora_rl import RLSampler
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.samplers.adaptation import AFTER
from tests.samplers.subjects import params_of
from tests.samplers.subjects import suggest_lora
from tests.samplers.subjects import suggest_plain


def _objective(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)
    rank = trial.suggest_int("lora_rank", 2, 128, log=True)
    return abs(math.log10(lr) + 1.7) + 0.1 * abs(math.log2(rank) - 5)


def _run(sampler: RLSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(_objective, n_trials=trials)
    return study


def _learnt(sampler: RLSampler) -> list[torch.Tensor]:
    assert sampler._adaptation is not None
    return [network.last.weight for network in sampler._adaptation._known._kept.values()]


@pytest.fixture(scope="module")
def adapted() -> tuple[RLSampler, optuna.Study]:
    sampler = RLSampler(seed=1, n_candidates=64, adapt=True)
    return sampler, _run(sampler, AFTER[1] + 2)


def test_nothing_changes_before_the_first_fixed_number(
    adapted: tuple[RLSampler, optuna.Study],
) -> None:
    before = _run(RLSampler(seed=1, n_candidates=64), AFTER[0])
    assert params_of(adapted[1])[: AFTER[0]] == params_of(before)
    sampler = RLSampler(seed=1, n_candidates=64, adapt=True)
    _run(sampler, AFTER[0])
    assert not _learnt(sampler)


def test_the_policy_learns_at_the_fixed_numbers(adapted: tuple[RLSampler, optuna.Study]) -> None:
    learnt = _learnt(adapted[0])
    assert len(learnt) == 2
    start = adapted[0]._network
    assert start is not None
    assert not torch.equal(learnt[0], start.last.weight)
    assert not torch.equal(learnt[1], learnt[0])


def test_a_resumed_study_and_a_pickled_sampler_come_to_the_same_weights(
    adapted: tuple[RLSampler, optuna.Study],
) -> None:
    sampler, study = adapted
    for other in (
        RLSampler(seed=1, n_candidates=64, adapt=True),
        pickle.loads(pickle.dumps(sampler)),
    ):
        resumed = optuna.create_study(sampler=other)
        resumed.add_trials(study.trials[:-1])
        resumed.optimize(_objective, n_trials=1)
        assert params_of(resumed)[-1] == params_of(study)[-1]
        for a, b in zip(_learnt(other), _learnt(sampler), strict=True):
            # To the rounding of sums, which depends on where arrays lie in memory.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_workers_that_take_turns_agree(
    adapted: tuple[RLSampler, optuna.Study],
) -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(study_name="s", storage=storage)
    workers = [
        optuna.load_study(
            study_name="s",
            storage=storage,
            sampler=RLSampler(seed=1, n_candidates=64, adapt=True),
        )
        for _ in range(2)
    ]
    for turn in range(AFTER[0] + 3):
        workers[turn % 2].optimize(_objective, n_trials=1)
    assert params_of(workers[0]) == params_of(adapted[1])[: AFTER[0] + 3]


def test_repeats_and_odd_trials_are_left_out() -> None:
    study = optuna.create_study(sampler=RLSampler(seed=0, n_candidates=64, adapt=True))
    for _ in range(2):
        study.enqueue_trial({"learning_rate": 1e-3, "lora_rank": 8})
    study.optimize(_objective, n_trials=AFTER[0] + 1)
    assert len(study.trials) == AFTER[0] + 1


def test_there_must_be_a_policy_to_adapt() -> None:
    with pytest.raises(UserError, match="adapt is True, but learned is False"):
        RLSampler(adapt=True, learned=False)
    with pytest.raises(UserError, match="adapt is 'yes', but must be True or False"):
        RLSampler(adapt="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("n_objectives", [1, 2])
def test_any_space_and_any_trial_will_do(n_objectives: int) -> None:
    for suggest in (suggest_lora, suggest_plain):
        study = optuna.create_study(
            directions=["minimize"] * n_objectives,
            sampler=RLSampler(seed=0, n_candidates=32, adapt=True),
        )
        for _ in range(AFTER[0] + 1):
            trial = study.ask()
            value = suggest(trial)
            if trial.number % 4 == 3:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, [value] * n_objectives)
        assert len(study.trials) == AFTER[0] + 1
