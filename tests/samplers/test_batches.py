"""Several configurations asked for at once, before any of them has a result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from optuna.trial import create_trial

from optuna_lora_rl import RLSampler
from optuna_lora_rl import samplers
from optuna_lora_rl.samplers import rl
from optuna_lora_rl.samplers.history import space_of
from studies.comparison.functions import classic_problems
from studies.comparison.problem import Problem
from studies.comparison.synthetic import TEST_SEED
from studies.comparison.synthetic import synthetic_problems
from tests.samplers.subjects import suggest_lora

NAMES = ["rl", "bandit", "tpe", "gp", "random"]
# TPE and GP draw at random before.
TOLD = 12


def begun(name: str, told: int, **options: Any) -> optuna.Study:
    sampler = samplers.create(name, seed=3, options=options)
    study = optuna.create_study(sampler=sampler)
    for _ in range(told):
        trial = study.ask()
        study.tell(trial, suggest_lora(trial))
    return study


def batch(study: optuna.Study, size: int) -> list[optuna.Trial]:
    trials = []
    for _ in range(size):
        trials.append(study.ask())
        suggest_lora(trials[-1])
    return trials


def places(trials: list[optuna.Trial]) -> np.ndarray:
    """The trials' points in the unit cube, shape (n, d)."""
    space = space_of(trials[0].distributions, {})
    return np.array([space.encode(trial.params) for trial in trials])


@pytest.mark.parametrize("told", [0, TOLD])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_no_duplicates(name: str, told: int) -> None:
    asked = batch(begun(name, told), 8)
    assert len({str(trial.params) for trial in asked}) == 8


@pytest.mark.parametrize("name", ["rl", "bandit"])
def test_a_small_space_is_tried_whole_before_anything_repeats(name: str) -> None:
    study = optuna.create_study(sampler=samplers.create(name, seed=0, options={}))
    for _ in range(6):
        trial = study.ask()
        trial.suggest_categorical("target_modules", ["qv", "mlp"])
        trial.suggest_categorical("lora_rank", [4, 8, 16])
    assert len({str(trial.params) for trial in study.trials}) == 6


@pytest.mark.parametrize("name", ["rl", "tpe", "gp"])
def test_the_next_proposal_knows_what_is_running(name: str) -> None:
    own = begun(name, TOLD)
    batch(own, 1)
    (second,) = batch(own, 1)
    other = begun(name, TOLD)
    other.enqueue_trial(second.params)
    batch(other, 1)
    (elsewhere,) = batch(other, 1)
    # The same number, seed and results; only the running trial differs.
    assert second.number == elsewhere.number and second.params != elsewhere.params


@pytest.mark.parametrize("told", [0, TOLD])
def test_the_learned_sampler_spreads_a_batch(told: int) -> None:
    points = places(batch(begun("rl", told), 8))
    distances = np.abs(points[:, None] - points[None]).max(axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(axis=1)
    assert nearest.mean() > 0.15 and nearest.min() > 0.02


def regret(problem: Problem, name: str, *, side_by_side: int, trials: int) -> float:
    """Best regret of a study whose trials run side by side and end in turn."""
    study = optuna.create_study(
        direction="maximize", sampler=samplers.create(name, seed=0, options={})
    )
    running: list[tuple[optuna.Trial, float | None]] = []
    best = 3.0
    for number in range(trials + side_by_side):
        if number < trials:
            trial = study.ask()
            try:
                score, lost = problem.run(trial, np.random.default_rng(number))
                running.append((trial, score))
                best = min(best, lost)
            except FloatingPointError:
                running.append((trial, None))
        if running and (len(running) == side_by_side or number >= trials):
            ended, result = running.pop(0)
            state = optuna.trial.TrialState.FAIL if result is None else None
            study.tell(ended, result, state=state)
    return best


@pytest.fixture(scope="module")
def problems() -> Iterator[list[Problem]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield synthetic_problems(6, TEST_SEED) + classic_problems()[:1]
    torch.set_num_threads(before)


def test_eight_at_a_time_finds_better_than_random_search(problems: list[Problem]) -> None:
    ours, random = (
        [regret(problem, name, side_by_side=8, trials=24) for problem in problems]
        for name in ("rl", "random")
    )
    assert np.median(ours) < 0.7 * np.median(random)


def test_it_thinks_on_while_others_take_what_it_thinks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"x": IntDistribution(0, 19)}
    study = optuna.create_study(sampler=RLSampler(seed=0))
    for x in (0, 19):
        study.add_trial(create_trial(value=x, params={"x": x}, distributions=ranges))
    taken: list[int] = []
    real = rl._chosen

    def chosen(*given: Any) -> Any:
        point, why = real(*given)
        if len(taken) < 6:
            params = space_of(ranges).decode(point)
            taken.append(params["x"])
            rival = create_trial(state=TrialState.RUNNING, params=params, distributions=ranges)
            study.add_trial(rival)
        return point, why

    monkeypatch.setattr(rl, "_chosen", chosen)
    assert study.ask(ranges).params["x"] not in {0, 19, *taken}
    assert len(taken) == 6
