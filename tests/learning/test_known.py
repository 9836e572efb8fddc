"""Training tasks that know something, and targets that look ahead."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from optuna_lora_rl import TuningContext
from optuna_lora_rl.learning.environment import WIDE
from optuna_lora_rl.learning.environment import TuningEnvironment
from optuna_lora_rl.learning.lookahead import lookahead
from optuna_lora_rl.learning.rollouts import Teaching
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Scorer
from tests.learning.test_measured import SURFACE

TOLD = draw_tasks(60, 3, contexts=True)


def _environment(task: Task, trials: int = 0) -> TuningEnvironment:
    generator = torch.Generator().manual_seed(0)
    environment = TuningEnvironment(task, 10, generator, settings=WIDE)
    for _ in range(trials):
        environment.step(int(environment.decide(None).logits.argmax()))
    return environment


def test_what_is_told_changes_no_task() -> None:
    for one, other in zip(draw_tasks(60, 3), TOLD, strict=True):
        assert (one.best, one.median, one.space.written) == (
            other.best,
            other.median,
            other.space.written,
        )
        assert one.context is None and not one.charges
    lora = [task for task in TOLD if task.truth[3] > 0]
    assert any(task.charges for task in lora) and any(task.context for task in lora)
    assert all(task.context is None for task in TOLD if task.truth[3] == 0)


def test_most_models_fit_their_tasks_rate_and_some_mislead() -> None:
    off = [
        abs(task.layout.expected.mean - task.peak)
        for task in draw_tasks(150, 5, contexts=True)
        if task.layout.expected is not None and not math.isnan(task.peak)
    ]
    assert len(off) > 30
    assert np.median(off) < 0.35 and max(off) > 0.8


def test_a_measured_task_is_told_what_was_measured() -> None:
    surface = copy.copy(SURFACE)
    surface.context = TuningContext(hidden_size=96, examples=33)
    told = [t for t in draw_tasks(90, 3, [surface], 0.9, contexts=True) if t.context and t.cut]
    there = [t.context for t in told if t.cut and t.cut.shift == 0.0 and t.context]
    widths = [context.hidden_size for context in there if context.hidden_size]
    assert len(widths) > 3 and np.mean([width == 96 for width in widths]) > 0.6
    assert {context.examples for context in there} <= {33, None}
    moved = [t.context.hidden_size for t in told if t.cut and t.cut.shift and t.context]
    assert any(width not in (96, None) for width in moved)


def test_a_known_cost_is_told_apart_from_the_quality() -> None:
    task = next(task for task in TOLD if task.charges)
    environment = _environment(task, 5)
    decision = environment.decide(None)
    trials = decision.trials
    assert trials.charged is not None and np.ptp(trials.charged) > 0
    x = np.random.default_rng(0).random((64, len(task.space)))
    assert (task.cost(x) >= 0).all()
    # The best trial is the best after costs.
    scores = np.where(trials.good, environment._scores[:5], -np.inf)
    assert trials.best_at == int(scores.argmax())


def test_looking_ahead_says_what_is_worth_a_trial() -> None:
    task = next(t for t in TOLD if t.truth[3] > 0 and t.layout.bank.speaks)
    assert lookahead(_environment(task).decide(None), 0.02) is None or task.layout.is_lora
    environment = _environment(task, 2)
    decision = environment.decide(None)
    target = lookahead(decision, task.floor)
    assert target is not None and target.shape == (len(decision.x),)
    assert (target >= 0).all() and target.sum() > 0
    assert not target[~decision.valid].any()
    assert (target > 0).sum() <= 20


def test_the_first_trials_pay_for_the_regret_itself() -> None:
    task, generator = TOLD[0], torch.Generator().manual_seed(0)
    plain = TuningEnvironment(task, 8, generator)
    both = TuningEnvironment(task, 8, torch.Generator().manual_seed(0), linear=1.0)
    x = task.space.snap(np.random.default_rng(0).random((7, len(task.space))))
    for t, point in enumerate(x):
        before = min(plain.regret, 1.5)
        reward = plain.run(point)
        fallen = before - min(plain.regret, 1.5)
        assert both.run(point) == pytest.approx(reward + (fallen if t < 5 else 0.0))


def test_episodes_may_begin_with_trials_of_somebody_else() -> None:
    network, tasks = Scorer(8, wide=True), TOLD[:6]
    critic, generator = Critic(6, 8, wide=True), torch.Generator().manual_seed(1)
    teaching = Teaching(opened=1.0, linear=0.5, lookahead=0.5)
    rollout = collect(tasks, 4, network, critic, generator, teaching=teaching)
    first = rollout.features.context.view(4, len(tasks), -1)[0]
    assert rollout.rewards.shape == (4, len(tasks))
    # Trials have been seen already when the policy begins, unless they come late.
    assert (first[:, 2] > 0).sum() >= 4
    assert torch.isfinite(rollout.target).all() and (rollout.target.sum(1) > 0).any()
    assert replace(TOLD[0], context=None).context is None
