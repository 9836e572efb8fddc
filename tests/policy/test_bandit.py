from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optuna_lora_rl.policy.bandit import Algorithm
from optuna_lora_rl.policy.bandit import Bandit
from optuna_lora_rl.policy.bandit import rank_rewards
from optuna_lora_rl.policy.bandit import scalarise
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.levels import Grid
from optuna_lora_rl.policy.levels import make_grid

ALGORITHMS: list[Algorithm] = ["thompson", "ucb"]
every_bandit = pytest.mark.parametrize("contextual", [False, True])
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def grid_of(*sizes: int) -> Grid:
    dimensions = [Dimension(f"p{j}", "int", 1, size) for j, size in enumerate(sizes)]
    return make_grid(make_space(dimensions))


def play(
    grid: Grid,
    score: Callable[[np.ndarray], float],
    n: int,
    algorithm: Algorithm,
    contextual: bool,
    *,
    seed: int = 0,
    repeats: bool = True,
) -> np.ndarray:
    """Play ``n`` rounds; returns the played cells, shape (n, d)."""
    rng = np.random.default_rng(seed)
    cells = np.empty((0, len(grid.sizes)), dtype=int)
    scores: list[float] = []
    for _ in range(n):
        bandit = Bandit(
            grid,
            cells,
            rank_rewards(np.array(scores)),
            algorithm=algorithm,
            contextual=contextual,
            tried=None if repeats else cells,
        )
        cell = bandit.propose(rng)
        cells = np.vstack([cells, cell])
        scores.append(score(cell) + 0.1 * float(rng.normal()))
    return cells


def test_rewards_order_scores_then_violations_then_failures() -> None:
    scores = np.array([1.0, 5.0, 9.0, 9.0, np.nan, -1e30])
    failed = np.array([False, False, False, False, True, False])
    violation = np.array([0.0, 0.0, 2.0, 1.0, 0.0, 0.0])
    ranks = rank_rewards(scores, failed, violation)
    assert np.argsort(ranks).tolist() == [4, 2, 3, 5, 0, 1]


@given(arrays(float, st.integers(1, 20), elements=st.floats(-1e6, 1e6)))
def test_rewards_lie_between_0_and_1_and_know_no_scale(scores: np.ndarray) -> None:
    ranks = rank_rewards(scores)
    assert ((ranks > 0) & (ranks < 1)).all()
    assert ranks.mean() == pytest.approx(0.5)
    assert rank_rewards(8.0 * scores) == pytest.approx(ranks)


def test_where_all_failed_the_untried_looks_better() -> None:
    assert (rank_rewards(np.zeros(3), np.ones(3, dtype=bool)) < 0.5).all()


def test_chebyshev_weights_find_each_part_of_the_front() -> None:
    front = np.array([[4.0, 0.0], [3.0, 3.0], [0.0, 4.0], [2.0, 2.0]])
    best = [int(scalarise(front, np.array([w, 1 - w])).argmax()) for w in (0.99, 0.5, 0.01)]
    assert best == [0, 1, 2]


@every_bandit
@every_algorithm
def test_every_bandit_comes_to_play_the_best_arm(algorithm: Algorithm, contextual: bool) -> None:
    grid = grid_of(5, 4)

    def score(cell: np.ndarray) -> float:
        return float(-abs(cell[0] - 3) - abs(cell[1] - 1))

    cells = play(grid, score, 120, algorithm, contextual)
    share = (cells[-40:] == [3, 1]).all(axis=1).mean()
    assert share > 0.3, share  # chance: 0.05


@every_algorithm
def test_the_contextual_bandit_sees_what_acts_together(algorithm: Algorithm) -> None:
    grid = grid_of(4, 4)
    cells = np.indices((4, 4)).reshape(2, -1).T
    # The last levels are bad each by itself, and best together.
    bad = (cells == 3).sum(axis=1)
    ranks = rank_rewards(np.where(bad == 2, 2.0, -bad))
    found = {
        contextual: Bandit(
            grid, cells, ranks, algorithm=algorithm, contextual=contextual, exploration=0.0
        )
        .propose(np.random.default_rng(0))
        .tolist()
        for contextual in (False, True)
    }
    assert found[True] == [3, 3]
    assert 3 not in found[False]


@every_bandit
@every_algorithm
def test_nothing_is_tried_twice_before_everything_was(
    algorithm: Algorithm, contextual: bool
) -> None:
    cells = play(
        grid_of(3, 4), lambda cell: float(cell.sum()), 14, algorithm, contextual, repeats=False
    )
    assert len(np.unique(cells[:12], axis=0)) == 12


@every_bandit
@every_algorithm
def test_without_exploration_a_bandit_repeats_what_was_best(
    algorithm: Algorithm, contextual: bool
) -> None:
    grid = grid_of(3, 3)
    cells = np.stack(np.meshgrid(range(3), range(3))).reshape(2, -1).T
    ranks = rank_rewards(-np.abs(cells - [2, 0]).sum(axis=1).astype(float))
    bandit = Bandit(
        grid, cells, ranks, algorithm=algorithm, contextual=contextual, exploration=0.0
    )
    for seed in range(5):
        assert bandit.propose(np.random.default_rng(seed)).tolist() == [2, 0]


@every_bandit
def test_ucb_plays_elsewhere_while_a_result_is_awaited(contextual: bool) -> None:
    grid = grid_of(6)
    cells = np.arange(6)[:, None]
    ranks = np.full(6, 0.5)
    waiting = np.array([[0], [1], [2], [4], [5]] * 2)
    bandit = Bandit(grid, cells, ranks, algorithm="ucb", contextual=contextual, pending=waiting)
    assert bandit.propose(np.random.default_rng(0)).tolist() == [3]


def test_ucb_plays_every_arm_once_first() -> None:
    cells = play(grid_of(6), lambda cell: float(cell[0]), 6, "ucb", contextual=False)
    assert sorted(cells[:, 0]) == list(range(6))


@every_bandit
@every_algorithm
def test_absent_parameters_teach_and_disturb_nothing(
    algorithm: Algorithm, contextual: bool
) -> None:
    grid = grid_of(3, 3)
    cells = np.array([[0, -1], [1, -1], [2, -1]] * 5)
    ranks = rank_rewards(cells[:, 0].astype(float))
    bandit = Bandit(
        grid, cells, ranks, algorithm=algorithm, contextual=contextual, exploration=0.1
    )
    proposals = [bandit.propose(np.random.default_rng(seed)).tolist() for seed in range(20)]
    assert {cell[0] for cell in proposals} == {2}
    assert {cell[1] for cell in proposals} == {0, 1, 2}


def test_thompson_posterior_is_the_textbooks() -> None:
    # Many draws of an arm's mean against the normal-inverse-gamma posterior in closed form.
    grid = grid_of(2)
    ranks = np.array([0.9, 0.8, 0.7, 0.2])
    bandit = Bandit(grid, np.array([[1], [1], [1], [0]]), ranks)
    rng = np.random.default_rng(0)
    draws = np.array([bandit._thompson_draws(0, 2, rng)[1] for _ in range(20000)])
    z = bandit._z[:3]
    kappa, alpha = 1.0 + 3, 2.0 + 1.5
    beta = 1.0 + 0.5 * ((z - z.mean()) ** 2).sum() + 0.5 * 3 * z.mean() ** 2 / kappa
    assert draws.mean() == pytest.approx(3 * z.mean() / kappa, abs=0.02)
    # Student t with 2 alpha degrees of freedom.
    assert draws.var() == pytest.approx(beta / (alpha - 1) / kappa, rel=0.06)


@pytest.mark.parametrize("size", [1, 40])
def test_many_levels_and_a_single_one(size: int) -> None:
    choices = tuple(f"c{i}" for i in range(size))
    grid = make_grid(
        make_space([Dimension(f"k{j}", "categorical", choices=choices) for j in range(5)])
    )
    cells = play(grid, lambda cell: float(cell.sum()), 3, "ucb", contextual=True)
    assert ((cells >= 0) & (cells < size)).all()
