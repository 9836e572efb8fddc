from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection

from optuna_lora_rl import RLSampler
from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.transfer import EarlierStudies

X = {"lr": FloatDistribution(1e-5, 0.3, log=True)}


def _objective(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)
    rank = trial.suggest_int("lora_rank", 2, 128, log=True)
    return abs(math.log10(lr) + 1.7) + 0.1 * abs(math.log2(rank) - 5)


def _relative(trial: optuna.Trial) -> float:
    """Another model: other names, ranges, metric and direction; nearly the same optimum."""
    lr = trial.suggest_float("lr", 1e-5, 0.3, log=True)
    rank = trial.suggest_categorical("r", [4, 8, 16, 32, 64])
    trial.suggest_float("lora_dropout", 0.0, 0.2)
    return 90.0 - 10.0 * abs(math.log10(lr) + 1.6) - abs(math.log2(rank) - 5)


def _source(seed: int = 0, trials: int = 25) -> optuna.Study:
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.optimize(_relative, n_trials=trials)
    return study


def _run(sampler: optuna.samplers.BaseSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(_objective, n_trials=trials)
    return study


def test_related_studies_put_the_first_trials_near_the_optimum() -> None:
    study = _run(RLSampler(seed=0, source_studies=[_source(0), _source(1)]), 3)
    assert samplers.proposal(study.trials[0]) == {"source": "transfer"}
    assert study.trials[0].value < 0.6
    assert study.best_value < min(t.value for t in _run(RLSampler(seed=0), 3).trials)


def test_proposals_are_a_function_of_the_sources_and_the_history() -> None:
    sampler = RLSampler(seed=3, source_studies=[_source()])
    copy = pickle.loads(pickle.dumps(sampler))
    study = _run(sampler, 6)
    assert [t.params for t in study.trials] == [t.params for t in _run(copy, 6).trials]
    resumed = optuna.create_study(sampler=RLSampler(seed=3, source_studies=[_source()]))
    resumed.add_trials(study.trials[:4])
    resumed.optimize(_objective, n_trials=2)
    assert [t.params for t in resumed.trials[4:]] == [t.params for t in study.trials[4:]]


def test_a_list_of_trials_is_read_anew_for_another_direction() -> None:
    trials, space = _source().trials, space_of(X)
    layout, weights = Layout(space), np.ones(1)
    earlier = EarlierStudies([trials], {})
    best = {
        direction: earlier.models(space, layout, [direction], weights)[0].best[0].tolist()
        for direction in (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
    }
    assert best[StudyDirection.MAXIMIZE] != best[StudyDirection.MINIMIZE]


def test_a_list_of_trials_has_the_directions_of_the_new_study() -> None:
    def negated(trial: optuna.Trial) -> float:
        return -_relative(trial)

    source = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    source.optimize(negated, n_trials=25)
    assert _run(RLSampler(seed=0, source_studies=[source.trials]), 1).best_value < 0.6


def test_what_the_sources_found_outside_the_range_ends_at_its_border() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("lora_rank", 2, 128, log=True)
        return trial.suggest_float("learning_rate", 1e-6, 1e-3, log=True)

    study = optuna.create_study(sampler=RLSampler(seed=0, source_studies=[_source()]))
    study.optimize(objective, n_trials=2)
    assert study.trials[0].params["learning_rate"] > 5e-4


@pytest.mark.parametrize("n_objectives", [1, 2])
def test_sources_with_another_number_of_objectives_are_fine(n_objectives: int) -> None:
    source = optuna.create_study(
        directions=["maximize"] * (3 - n_objectives), sampler=optuna.samplers.TPESampler(seed=0)
    )
    source.optimize(
        lambda trial: [_relative(trial)] * (3 - n_objectives) if n_objectives == 1
        else _relative(trial),
        n_trials=8,
    )  # fmt: skip
    study = optuna.create_study(
        directions=["minimize"] * n_objectives, sampler=RLSampler(seed=0, source_studies=[source])
    )
    study.optimize(lambda trial: [_objective(trial)] * n_objectives, n_trials=4)
    assert len(study.best_trials) >= 1


def test_what_is_no_study_or_says_too_little_is_refused() -> None:
    empty = optuna.create_study(study_name="empty")
    with pytest.raises(UserError, match="'empty' has 0 trials with a result, but at least 3"):
        RLSampler(source_studies=[empty])
    with pytest.raises(UserError, match="item 0 is 'runs/a', but must be an Optuna study"):
        RLSampler(source_studies=["runs/a"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="must be a list of studies"):
        RLSampler(source_studies=_source(trials=3))  # type: ignore[arg-type]


def test_a_list_of_trials_must_have_a_value_for_each_direction() -> None:
    source = optuna.create_study(directions=["minimize", "minimize"])
    source.optimize(lambda t: (t.suggest_float("x", 0, 1), 1.0), n_trials=4)
    sampler = RLSampler(seed=0, source_studies=[source.trials])
    with pytest.raises(UserError, match="a trial with 2 values, but must have 1"):
        optuna.create_study(sampler=sampler).ask().suggest_float("x", 0, 1)


def test_choices_may_be_lists() -> None:
    def objective(trial: optuna.Trial) -> float:
        choices: list[Any] = [["q", "v"], ["q"], {"only": "v"}]
        return float(len(trial.suggest_categorical("targets", choices)))

    study = optuna.create_study(sampler=RLSampler(seed=0))
    study.optimize(objective, n_trials=4)
    again = optuna.create_study(sampler=RLSampler(seed=0, source_studies=[study]))
    again.optimize(objective, n_trials=3)
    assert len({str(trial.params) for trial in study.trials[:3]}) == 3
