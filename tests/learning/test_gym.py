from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.gym import ID
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return draw_tasks(6, seed=2)


def _episode(env: Any, seed: int) -> tuple[list[float], dict[str, Any]]:
    _, info = env.reset(seed=seed)
    rewards, over = [], False
    while not over:
        seen, reward, over, truncated, info = env.step(int(info["action_mask"].argmax()))
        assert not truncated
        assert env.observation_space.contains(seen)
        rewards.append(reward)
    return rewards, info


def test_gymnasiums_checker_has_nothing_to_say(
    tasks: list[Task], recwarn: pytest.WarningsRecorder
) -> None:
    check_env(gymnasium.make(ID, trials=5, tasks=tasks).unwrapped, skip_render_check=True)
    assert [str(w.message) for w in recwarn if "gym" in str(w.message).lower()] == []


def test_an_episode_is_a_study_and_its_rewards_add_up_to_what_it_found(tasks: list[Task]) -> None:
    env = gymnasium.make(ID, trials=4, tasks=tasks)
    rewards, info = _episode(env, seed=3)
    floor = tasks[info["task"]].floor
    assert len(rewards) == 4
    assert sum(rewards) == pytest.approx(np.log(3.0 + floor) - np.log(info["regret"] + floor))
    space = tasks[info["task"]].space
    assert info["params"].keys() == set(space.names)
    assert _episode(env, seed=3)[0] == rewards


def test_a_task_can_be_asked_for(tasks: list[Task]) -> None:
    env = gymnasium.make(ID, trials=4, tasks=tasks)
    assert env.reset(seed=0, options={"task": 5})[1]["task"] == 5
    with pytest.raises(UserError, match="task is 6, but must be between 0 and 5"):
        env.reset(options={"task": 6})
    with pytest.raises(UserError, match="trials is 0, but must be at least 1"):
        gymnasium.make(ID, trials=0)


def test_studies_run_side_by_side_and_begin_anew_after_the_last_trial(tasks: list[Task]) -> None:
    envs = gymnasium.make_vec(
        ID, num_envs=3, vectorization_mode="sync", vector_kwargs={}, trials=2, tasks=tasks
    )
    seen, infos = envs.reset(seed=0)
    assert envs.observation_space.contains(seen)
    ends = []
    for _ in range(4):
        seen, _, over, _, infos = envs.step(infos["action_mask"].argmax(1))
        assert envs.observation_space.contains(seen)
        ends.append(over.tolist())
    assert ends == [[False] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert infos["regret"].shape == (3,)
