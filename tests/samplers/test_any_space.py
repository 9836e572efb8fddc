"""Any space that Optuna takes, with any history: no error, no warning, a value of the space.

``FUZZ_EXAMPLES=3000 pytest tests/samplers/test_any_space.py`` tries more of them.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from contextlib import suppress
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from optuna.trial import create_trial

from optuna_lora_rl import BanditSampler
from optuna_lora_rl import RLSampler

NAMES = [
    *("learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "batch_size", "max_steps"),
    *("weight_decay", "target_modules", "warmup_ratio", "use_dora", "x", "y"),
]
LARGEST = 1.7e308
EDGES = [0.0, 1.0, -1.0, 5e-324, 1e-300, 1e300, LARGEST, -LARGEST, 1e16, 0.1, 64.0]
# Optuna keeps whole numbers as floats: beyond 2 ** 53 it returns their neighbours.
EXACT = 2**53
CHOICES = [None, True, False, 0, 1, 8, "a", "none", 1.5, math.inf, math.nan, LARGEST, 2**70, -0.0]
STATES = [TrialState.COMPLETE] * 6 + [TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING]


def some_number(rng: random.Random) -> float:
    way = rng.random()
    if way < 0.4:
        return rng.choice(EDGES)
    if way < 0.7:
        return rng.uniform(-10, 10)
    return rng.choice([1, -1]) * 10 ** rng.uniform(-320, 308)


def some_distribution(rng: random.Random) -> BaseDistribution:
    kind, log = rng.choice(["float", "int", "categorical"]), rng.random() < 0.4
    if kind == "categorical":
        return CategoricalDistribution(rng.choices(CHOICES, k=rng.choice([1, 2, 3, 5, 30])))
    if kind == "int":
        ends = [rng.choice([rng.randint(1, 100), 2**31, EXACT, 2**63 - 1]) for _ in range(2)]
        low, high = sorted(ends if log else [rng.choice([1, -1]) * end for end in ends])
        step = 1 if log else rng.choice([1, 1, 3, 2**40])
        return IntDistribution(low, high - (high - low) % step, log=log, step=step)
    low, high = sorted(abs(some_number(rng)) or 1e-9 if log else some_number(rng) for _ in "12")
    # More steps than there are floating-point numbers are more than Optuna itself can count.
    step = rng.choice([None, 0.1, 3.0]) if not log and high - low < 1e6 else None
    if step is not None:
        high = low + math.floor((high - low) / step) * step
    return FloatDistribution(low, high, log=log, step=step)


def some_value(rng: random.Random, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return rng.choice(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if rng.random() < 0.3 or (step and isinstance(distribution, FloatDistribution)):
        return rng.choice([low, high])
    if isinstance(distribution, IntDistribution):
        return distribution.low + rng.randint(0, (high - low) // step) * step
    share = rng.random()
    return min(max(low * (1 - share) + high * share, low), high)


def some_result(rng: random.Random) -> float:
    edge = rng.choice([LARGEST, -LARGEST, math.inf, -math.inf, 0.0, 1.0, 1e-320])
    return edge if rng.random() < 0.25 else rng.gauss(0, 1)


def some_study(
    rng: random.Random, sampler: BaseSampler
) -> tuple[optuna.Study, dict[str, BaseDistribution]]:
    space = {name: some_distribution(rng) for name in rng.sample(NAMES, rng.randint(1, 5))}
    n_objectives = rng.choice([1, 1, 1, 2])
    study = optuna.create_study(directions=["minimize"] * n_objectives, sampler=sampler)
    for _ in range(rng.choice([0, 1, 2, 5, 12, 30])):
        told = {name: d for name, d in space.items() if rng.random() < 0.9}
        for name, d in told.items():
            if isinstance(d, FloatDistribution) and d.step is None and rng.random() < 0.1:
                # An earlier, wider range of the same parameter.
                told[name] = FloatDistribution(min(d.low, 1.0), LARGEST, log=d.log)
        state = rng.choice(STATES)
        done = state == TrialState.COMPLETE
        reports = {step: some_result(rng) for step in range(rng.randint(0, 2))}
        # Optuna itself does not take some whole numbers that a float cannot hold.
        with suppress(ValueError):
            study.add_trial(
                create_trial(
                    state=state,
                    params={name: some_value(rng, d) for name, d in told.items()},
                    distributions=told,
                    values=[some_result(rng) for _ in range(n_objectives)] if done else None,
                    intermediate_values=reports if n_objectives == 1 else None,
                )
            )
    return study, space


def check(value: Any, distribution: BaseDistribution) -> None:
    if isinstance(distribution, IntDistribution):
        assert type(value) is int
        slack = 0 if max(abs(distribution.low), abs(distribution.high)) <= EXACT else 1024
        assert distribution.low - slack <= value <= distribution.high + slack
        assert slack or (value - distribution.low) % distribution.step == 0
    else:
        assert distribution._contains(distribution.to_internal_repr(value))


MAKERS = {
    "rl": lambda: RLSampler(seed=0),
    "adapt": lambda: RLSampler(seed=0, adapt=True),
    "bandit": lambda: BanditSampler(seed=0),
    "linear": lambda: BanditSampler(seed=0, contextual=True),
}


@pytest.mark.filterwarnings("ignore:The distribution is specified by")
@pytest.mark.parametrize("name", MAKERS)
def test_a_proposal_is_a_value_of_the_space(name: str) -> None:
    for seed in range(int(os.environ.get("FUZZ_EXAMPLES", "200")) // len(MAKERS)):
        rng = random.Random(f"{name} {seed}")
        study, space = some_study(rng, MAKERS[name]())
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            trial = study.ask()
            for parameter, distribution in space.items():
                check(trial._suggest(parameter, distribution), distribution)
