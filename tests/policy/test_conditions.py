from __future__ import annotations

import numpy as np

from optuna_lora_rl.policy.conditions import Condition
from optuna_lora_rl.policy.conditions import learn_conditions
from optuna_lora_rl.policy.conditions import settle

# Columns: a switch, a parameter that only its upper value asks for, a free one.
POINTS = np.array([[0.25, 0.7, 0.1], [0.75, 0.2, 0.2], [0.25, 0.4, 0.9], [0.75, 0.3, 0.4]])
ASKED = np.array([[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)
DISCRETE = np.array([True, False, False])


def test_what_decides_is_found() -> None:
    assert learn_conditions(POINTS, ASKED, DISCRETE) == (Condition(1, 0, (0.25,)),)


def test_one_exception_takes_the_condition_back() -> None:
    points = np.vstack([POINTS, [0.25, 0.5, 0.5]])
    asked = np.vstack([ASKED, [True, True, True]])
    assert learn_conditions(points, asked, DISCRETE) == ()


def test_what_is_not_used_stands_at_its_default() -> None:
    conditions = learn_conditions(POINTS, ASKED, DISCRETE)
    settled = settle(POINTS, conditions, np.array([0.5, 0.55, 0.5]))
    assert settled[:, 1].tolist() == [0.55, 0.2, 0.55, 0.3]
    assert settled[:, [0, 2]].tolist() == POINTS[:, [0, 2]].tolist()
    assert POINTS[0, 1] == 0.7
