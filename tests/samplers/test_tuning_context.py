"""A sampler that knows the model: what it begins with, keeps with the study and explains."""

from __future__ import annotations

import math
import pickle

import optuna
import pytest

import optuna_lora_rl
from optuna_lora_rl import RLSampler
from optuna_lora_rl import TuningContext
from optuna_lora_rl.errors import UserError

NARROW = TuningContext(hidden_size=128, steps=32, batch_size=8)


def _objective(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)
    rank = trial.suggest_int("lora_rank", 2, 64, log=True)
    return abs(math.log10(rate) + 2.0) + 0.1 / rank


def _rates(sampler: RLSampler, trials: int = 3) -> list[float]:
    study = optuna.create_study(sampler=sampler)
    study.optimize(_objective, n_trials=trials)
    return [trial.params["learning_rate"] for trial in study.trials]


@pytest.mark.parametrize("learned", [True, False])
def test_the_first_trial_goes_by_the_model(learned: bool) -> None:
    # The learning rate is asked for first: the context says that it is LoRA's.
    narrow = _rates(RLSampler(seed=0, learned=learned, context=NARROW), 1)[0]
    wide = TuningContext(hidden_size=8192, steps=780, batch_size=128)
    assert narrow > 2e-3 > 1e-3 > _rates(RLSampler(seed=0, learned=learned, context=wide), 1)[0]


def test_it_is_kept_with_the_study_and_explained() -> None:
    study = optuna.create_study(sampler=RLSampler(seed=0, context=NARROW))
    study.optimize(_objective, n_trials=2)
    expected = _rates(RLSampler(seed=0, context=NARROW), 4)
    # Another worker, which was given none, has the same; and one that travelled.
    study.sampler = RLSampler(seed=0)
    study.optimize(_objective, n_trials=1)
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    study.optimize(_objective, n_trials=1)
    assert [trial.params["learning_rate"] for trial in study.trials] == expected
    assert expected != _rates(RLSampler(seed=0), 4)
    said = str(optuna_lora_rl.explain(study))
    assert "hidden size 128 and 32 steps: learning rate about 9e-3" in said


def test_what_is_no_context_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="must be a TuningContext"):
        RLSampler(context={"hidden_size": 3})  # type: ignore[arg-type]
