from __future__ import annotations

import numpy as np
import pytest
import torch

from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.environment import random_opening
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.environment import sweep_opening
from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.roles import ROLES


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return draw_tasks(60, seed=5)


def test_a_seed_gives_the_same_tasks(tasks: Tasks) -> None:
    again = draw_tasks(8, seed=5)
    assert torch.equal(again.best, tasks.best[:8])
    assert again.spaces == tasks.spaces[:8]
    assert not torch.equal(draw_tasks(8, seed=6).best, again.best)


def test_tasks_can_be_had_without_their_constraints(tasks: Tasks) -> None:
    free = draw_tasks(30, seed=5, constrained=False)
    assert free.spaces == tasks.spaces[:30]
    assert tasks.constrained[:30].any()
    assert not free.constrained.any()
    same = ~tasks.constrained[:30]
    assert torch.equal(free.best[same], tasks.best[:30][same])


def test_nothing_beats_the_known_best_by_much_and_the_median_is_the_median(tasks: Tasks) -> None:
    generator = torch.Generator().manual_seed(0)
    x = tasks.layout.snap(uniform_points(tasks.layout, 512, generator))
    score, failed = tasks.score(x)
    failed |= tasks.excess(x) > 0
    alive = torch.where(failed, torch.nan, score)
    assert alive.nan_to_num(-9.0).amax() < 1.05
    assert alive.nanmedian(1).values.abs().median() < 0.1
    assert 0.0 < failed.double().mean() < 0.25


def test_tasks_are_of_many_kinds(tasks: Tasks) -> None:
    lora_truth, shift, _, lora_space = tasks.truth.T
    assert 0.55 < lora_space.mean() < 0.9
    assert 0.15 < (shift.abs() > 0.7).float().sum() / lora_truth.sum() < 0.7
    widths = {len(space) for space in tasks.spaces}
    assert min(widths) <= 3
    assert max(widths) >= 7


def test_the_ridge_couples_learning_rate_and_alpha_over_rank(tasks: Tasks) -> None:
    """Where both are tuned, a higher alpha / rank wants a lower learning rate."""
    lr, rank, alpha = (ROLES.index(role) for role in ("learning_rate", "rank", "alpha"))
    has = tasks.layout.has_role
    rows = torch.nonzero(has[:, lr] & has[:, rank] & has[:, alpha] & tasks.surface.is_lora)[:, 0]
    assert len(rows) >= 3
    for row in rows.tolist():
        layout, surface = tasks.layout[row : row + 1], tasks.surface[row : row + 1]
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        x = layout.default[:, None].repeat(1, 101, 1)
        column = int(layout.role_column[0, alpha])
        peaks = []
        for u in (0.2, 0.8):
            x[:, :, column] = u
            x[:, :, int(layout.role_column[0, lr])] = grid
            value, _ = surface(x, layout)
            peaks.append(int(value.argmax()))
        assert peaks[1] <= peaks[0]


def test_rewards_add_up_to_the_fall_of_the_log_regret(tasks: Tasks) -> None:
    generator = torch.Generator().manual_seed(0)
    environment = TuningEnvironment(tasks, 4, generator)
    start, total = (environment.regret + tasks.floor).log(), torch.zeros(len(tasks))
    while not environment.done:
        logits = environment.decide(None).logits
        total += environment.step(logits.argmax(1)).reward
    fall = start - (environment.regret + tasks.floor).log()
    assert total.numpy() == pytest.approx(fall.numpy(), abs=1e-4)


def test_late_results_are_pending_first(tasks: Tasks) -> None:
    lag = torch.full((len(tasks),), 2)
    environment = TuningEnvironment(tasks, 5, torch.Generator().manual_seed(0), lag=lag)
    seen = []
    while not environment.done:
        observed = environment.observe()
        seen.append((int(observed.mask[0].sum()), int(observed.pending_mask[0].sum())))
        environment.step(environment.decide(None).logits.argmax(1))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]


def test_the_residual_policy_beats_random_search_on_training_tasks(tasks: Tasks) -> None:
    policy = rollout_regret(tasks, 10, None, 0)[:, -1]
    random = rollout_regret(tasks, 10, None, 0, random=True)[:, -1]
    gain = (random + 0.01).log() - (policy + 0.01).log()
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_a_constraint_can_be_kept_and_is_learnt_from(tasks: Tasks) -> None:
    rows = torch.nonzero(tasks.constrained)[:, 0]
    assert 1 <= len(rows) <= 15
    some = tasks[rows]
    x = some.layout.snap(uniform_points(some.layout, 256, torch.Generator().manual_seed(0)))
    kept = (some.excess(x) <= 0).double().mean(1)
    assert (kept > 0.1).all()
    assert (kept < 0.95).all()
    environment = TuningEnvironment(some, 6, torch.Generator().manual_seed(0))
    while not environment.done:
        environment.step(environment.decide(None).logits.argmax(1))
    seen = environment.observe()
    assert (some.excess(seen.x) <= 0).equal(~seen.infeasible)
    counts = torch.where(seen.good, (1.0 - some.score(seen.x)[0]).clamp(0.0, 3.0), 3.0)
    assert environment.regret.numpy() == pytest.approx(counts.amin(1).numpy())


def test_poor_trials_are_pruned_and_then_known_only_roughly(tasks: Tasks) -> None:
    B = len(tasks)
    environment = TuningEnvironment(
        tasks, 12, torch.Generator().manual_seed(0), pruning=torch.arange(B) % 2 == 0
    )
    x = uniform_points(tasks.layout, 12, torch.Generator().manual_seed(1))
    for t in range(12):
        environment.run(tasks.layout.snap(x)[:, t])
    pruned = environment._pruned
    assert not pruned[1::2].any()
    assert not pruned[:, :4].any()
    assert 0.2 < pruned[::2, 4:].double().mean() < 0.7
    # A pruned trial's score is one of the completed ones, below their median.
    row = int(torch.nonzero(pruned.any(1))[0])
    finals = environment._scores[row][~pruned[row]]
    guesses = environment._scores[row][pruned[row]]
    assert all(bool((finals == guess).any()) for guess in guesses)
    assert guesses.max() <= finals.median()


def test_openings_make_the_first_choices(tasks: Tasks) -> None:
    role = ROLES.index("learning_rate")
    some = tasks[torch.nonzero(tasks.layout.has_role[:, role])[:10, 0]]
    environment = TuningEnvironment(some, 6, torch.Generator().manual_seed(0))
    column = some.layout.role_column[:, role, None]
    places = []
    while (x := sweep_opening(environment)) is not None:
        places.append(x.gather(1, column)[:, 0])
        environment.run(x)
    assert len(places) == 5
    for place, wanted in zip(places[:3], (0.5, 0.25, 0.75), strict=True):
        assert place.numpy() == pytest.approx(np.full(10, wanted), abs=0.02)
    best = environment.observe().best(1)[0][:, 0].gather(1, column)[:, 0]
    assert ((torch.stack(places, 1) - best[:, None]).abs().amin(1) < 1e-9).all()
    assert (regret := rollout_regret(some, 3, None, 0, opening=random_opening)).shape == (10, 3)
    assert (regret.diff(dim=1) <= 0).all()


def test_the_candidates_hold_what_an_experts_sweep_does(tasks: Tasks) -> None:
    """Where LoRA's roles are known: the sweep's own five steps are among the proposals."""
    role = ROLES.index("learning_rate")
    rows = tasks.layout.has_role[:, role] & tasks.layout.is_lora & ~tasks.constrained
    some = tasks[torch.nonzero(rows)[:, 0]]
    environment = TuningEnvironment(some, 5, torch.Generator().manual_seed(0))
    column = some.layout.role_column[:, role, None]
    others = torch.ones_like(some.layout.default, dtype=torch.bool).scatter(1, column, False)
    while (x := sweep_opening(environment)) is not None:
        candidates = environment.decide(None).candidates
        distance = (candidates.x - x[:, None]).abs()
        assert (distance.amax(2).amin(1) < 0.07).double().mean() > 0.9
        assert torch.where(others, some.layout.default - x, 0.0).abs().max() < 1e-9
        environment.run(x)
