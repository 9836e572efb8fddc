from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from optuna_lora_rl.learning.environment import OPENINGS
from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.environment import sweep_opening
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.roles import ROLES

RATE, RANK, ALPHA = (ROLES.index(role) for role in ("learning_rate", "rank", "alpha"))


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return draw_tasks(60, seed=5)


def _points(task: Task, count: int, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return task.space.snap(uniform_points(count, len(task.space), generator))


def _environment(task: Task, length: int, **how: int) -> TuningEnvironment:
    return TuningEnvironment(task, length, torch.Generator().manual_seed(0), **how)


def _finish(environment: TuningEnvironment) -> list[float]:
    """Take the best candidates to the end; the rewards."""
    rewards = []
    while not environment.done:
        rewards.append(environment.step(int(environment.decide(None).logits.argmax())))
    return rewards


def test_a_seed_gives_the_same_tasks(tasks: list[Task]) -> None:
    again = draw_tasks(8, seed=5)
    assert [task.best for task in again] == [task.best for task in tasks[:8]]
    assert [task.space for task in again] == [task.space for task in tasks[:8]]
    other = draw_tasks(8, seed=6)
    assert [task.best for task in other] != [task.best for task in again]


def test_tasks_can_be_had_without_their_constraints(tasks: list[Task]) -> None:
    free = draw_tasks(30, seed=5, constrained=False)
    assert any(task.constrained for task in tasks[:30])
    for task, other in zip(free, tasks, strict=False):
        assert not task.constrained
        assert task.space == other.space
        assert other.constrained or task.best == other.best


def test_nothing_beats_the_known_best_by_much_and_the_median_is_the_median(
    tasks: list[Task],
) -> None:
    medians, failures = [], []
    for task in tasks:
        x = _points(task, 512)
        score, failed = task.score(x)
        failed = failed | (task.excess(x) > 0)
        assert score[~failed].max() < 1.05
        medians.append(np.median(score[~failed]))
        failures.append(failed.mean())
    assert np.median(np.abs(medians)) < 0.1
    assert 0.0 < np.mean(failures) < 0.25


def test_tasks_are_of_many_kinds(tasks: list[Task]) -> None:
    lora_truth, shift, _, lora_space = np.stack([task.truth for task in tasks]).T
    assert 0.55 < lora_space.mean() < 0.9
    assert 0.15 < (np.abs(shift) > 0.7).sum() / lora_truth.sum() < 0.7
    widths = {len(task.space) for task in tasks}
    assert min(widths) <= 3
    assert max(widths) >= 7
    assert {task.group for task in tasks} == {"usual_scale", "other_scale", "not_lora"}


def test_the_ridge_couples_learning_rate_and_alpha_over_rank(tasks: list[Task]) -> None:
    """Where both are tuned, a higher alpha / rank wants a lower learning rate."""
    coupled = [
        task
        for task in tasks
        if task.surface.is_lora and min(task.layout.column[r] for r in (RATE, RANK, ALPHA)) >= 0
    ]
    assert len(coupled) >= 3
    for task in coupled:
        x = np.repeat(task.layout.default[None], 101, axis=0)
        peaks = []
        for u in (0.2, 0.8):
            x[:, task.layout.column[ALPHA]] = u
            x[:, task.layout.column[RATE]] = np.linspace(0, 1, 101)
            peaks.append(int(task.surface(x, task.layout)[0].argmax()))
        assert peaks[1] <= peaks[0]


def test_rewards_add_up_to_the_fall_of_the_log_regret(tasks: list[Task]) -> None:
    for task in tasks[:10]:
        environment = _environment(task, 4)
        start = np.log(environment.regret + task.floor)
        rewards = _finish(environment)
        assert min(rewards) >= 0
        fall = start - np.log(environment.regret + task.floor)
        assert sum(rewards) == pytest.approx(fall, abs=1e-9)


def test_late_results_are_pending_first(tasks: list[Task]) -> None:
    environment, seen = _environment(tasks[0], 5, lag=2), []
    while not environment.done:
        trials = environment.observe()
        seen.append((len(trials), len(trials.pending)))
        environment.step(int(environment.decide(None).logits.argmax()))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]


def test_the_residual_policy_beats_random_search_on_training_tasks(tasks: list[Task]) -> None:
    policy, random = (
        rollout_regret(tasks, 10, None, 0, opening=OPENINGS[name])[:, -1]
        for name in ("defaults_then_gp", "gp")
    )
    gain = np.log(random + 0.01) - np.log(policy + 0.01)
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_a_constraint_can_be_kept_and_is_learnt_from(tasks: list[Task]) -> None:
    some = [task for task in tasks if task.constrained]
    assert 1 <= len(some) <= 15
    for task in some:
        assert 0.1 < (task.excess(_points(task, 256)) <= 0).mean() < 0.95
        environment = _environment(task, 6)
        _finish(environment)
        seen = environment.observe()
        assert ((task.excess(seen.x) > 0) == seen.infeasible).all()
        counts = np.where(seen.good, np.clip(1.0 - task.score(seen.x)[0], 0.0, 3.0), 3.0)
        assert environment.regret == pytest.approx(counts.min())


def test_poor_trials_are_pruned_and_then_known_only_roughly(tasks: list[Task]) -> None:
    shares = []
    for task in tasks:
        kept, pruned = (_environment(task, 12, pruning=pruning) for pruning in (False, True))
        for environment in (kept, pruned):
            for x in _points(task, 12, seed=1):
                environment.run(x)
        assert not kept._pruned.any()
        stopped = pruned._pruned
        assert not stopped[:4].any()
        shares.append(stopped[4:].mean())
        if stopped.any():
            # A pruned trial's score is one of the completed ones, below their median.
            finals = pruned._scores[~stopped & ~pruned._failed]
            guesses = pruned._scores[stopped]
            assert np.isin(guesses, finals).all()
            assert guesses.max() <= np.median(finals)
    assert 0.2 < np.mean(shares) < 0.7


def test_openings_make_the_first_choices(tasks: list[Task]) -> None:
    some = [task for task in tasks if task.layout.column[RATE] >= 0][:10]
    for task in some:
        environment, column, places = _environment(task, 6), task.layout.column[RATE], []
        while (x := sweep_opening(environment)) is not None:
            places.append(x[column])
            environment.run(x)
            if len(places) == 3:
                seen = environment.observe()
                best = seen.x[seen.best_at or 0, column]
        wanted = [0.5, 0.25, 0.75, min(best + 0.125, 1.0)]
        assert len(places) == 5
        assert places[:4] == pytest.approx(wanted, abs=0.02)
    regret = rollout_regret(some, 3, None, 0, opening=OPENINGS["gp"])
    assert regret.shape == (10, 3)
    assert (np.diff(regret, axis=1) <= 0).all()


def test_the_candidates_hold_what_an_experts_sweep_does(tasks: list[Task]) -> None:
    """Where LoRA's roles are known: the sweep's own five steps are among the proposals."""
    found = []
    for task in tasks:
        column = task.layout.column[RATE]
        if column < 0 or not task.layout.is_lora or task.constrained:
            continue
        environment = _environment(task, 5)
        while (x := sweep_opening(environment)) is not None:
            candidates = environment.decide(None).x
            found.append(np.abs(candidates - x).max(1).min() < 0.07)
            others = np.delete(x - task.layout.default, column)
            assert np.abs(others).max(initial=0.0) < 1e-9
            environment.run(x)
    assert np.mean(found) > 0.9


def test_studies_do_not_depend_on_who_runs_them(tasks: list[Task]) -> None:
    def backwards(function: Callable, jobs: list) -> list:
        return [function(job) for job in reversed(jobs)][::-1]

    one = rollout_regret(tasks[:6], 4, None, 3)
    assert np.array_equal(rollout_regret(tasks[:6], 4, None, 3, run=backwards), one)
    assert not np.array_equal(rollout_regret(tasks[:6], 4, None, 4), one)
