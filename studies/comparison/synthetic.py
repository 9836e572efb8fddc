"""Tasks of the families that the policy is trained on, drawn with another seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.dimensions import Dimension
from studies.comparison.problem import LORA
from studies.comparison.problem import OTHER
from studies.comparison.problem import Problem

# Tasks of this seed are neither trained nor validated on.
TEST_SEED = 777_000_001
# Decades between the best learning rate and the guides' from which a scale is another one.
_ANOTHER_SCALE = 0.7


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's distribution for a dimension."""
    if dimension.kind == "categorical":
        return CategoricalDistribution(dimension.choices)
    if dimension.kind == "int":
        return IntDistribution(round(dimension.low), round(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def synthetic_problem(task: Task, number: int) -> Problem:
    """A task of the training families as a problem for any Optuna sampler."""
    space = task.space
    is_lora, shift, _, lora_space = task.truth.tolist()
    is_lora_space = lora_space > 0
    shifted = is_lora_space and is_lora > 0 and abs(shift) > _ANOTHER_SCALE
    group = "LoRA, other scale" if shifted else "LoRA, usual scale" if is_lora_space else OTHER

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        score, failed = task.score(space.encode(params)[None])
        if failed[0]:
            raise FloatingPointError
        value = float(score[0])
        return value + task.noise * rng.normal(), max(0.0, 1.0 - value)

    distributions = {d.name: distribution(d) for d in space.dimensions}
    domain = LORA if is_lora_space else OTHER
    return Problem(f"synthetic-{number}", f"synthetic: {group}", domain, distributions, evaluate)


def synthetic_problems(count: int, seed: int) -> list[Problem]:
    """So many tasks of a seed."""
    # What a task may not exceed is not told to the samplers, so no task has a constraint here.
    tasks = draw_tasks(count, seed=seed, constrained=False)
    return [synthetic_problem(task, number) for number, task in enumerate(tasks)]
