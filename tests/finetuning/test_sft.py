from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.sft import Plan


@given(
    batch=st.integers(1, 64),
    micro=st.none() | st.integers(1, 64),
    evaluations=st.integers(1, 12),
    examples=st.integers(1, 500),
    max_steps=st.integers(0, 50),
)
def test_every_step_sees_the_whole_batch_and_the_last_is_evaluated(
    batch: int, micro: int | None, evaluations: int, examples: int, max_steps: int
) -> None:
    configuration = Configuration.of({"batch_size": batch, "max_steps": max_steps})
    options = TrainingOptions(micro_batch_size=micro, evaluations=evaluations)
    plan = Plan.of(configuration, options, examples)
    assert plan.micro_batch_size * plan.accumulation == batch
    assert plan.micro_batch_size <= (micro or batch)
    assert max(plan.evaluated) == plan.steps
    assert min(plan.evaluated) >= 1
    assert len(plan.evaluated) == min(evaluations, plan.steps)
    # Numbers stand for shares of the training, and the last step has the last.
    numbers = list(plan.evaluated.values())
    assert numbers == sorted(set(numbers)) and numbers[-1] == evaluations
    for step, number in plan.evaluated.items():
        assert abs(number / evaluations - step / plan.steps) <= 0.51 / min(evaluations, plan.steps)


@pytest.mark.parametrize(
    ("batch", "micro", "expected"), [(12, 8, (6, 2)), (8, None, (8, 1)), (8, 3, (2, 4))]
)
def test_batches_are_accumulated_from_equal_parts(
    batch: int, micro: int | None, expected: tuple[int, int]
) -> None:
    options = TrainingOptions(micro_batch_size=micro)
    plan = Plan.of(Configuration.of({"batch_size": batch}), options, 100)
    assert (plan.micro_batch_size, plan.accumulation) == expected


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 13), (0.5, 7), (2.0, 26)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    configuration = Configuration.of({"batch_size": 8, "num_train_epochs": epochs})
    assert Plan.of(configuration, TrainingOptions(), 100).steps == steps
