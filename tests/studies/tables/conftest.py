"""Made-up tables of known truth: the best rate falls with width and with steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.dataset import table
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import ScaledRecord
from optuna_lora_rl.policy.prior import coverage
from studies.tables import scale

BY_WIDTH, BY_STEPS = -0.5, -0.4


def best_rate(width: int, steps: float) -> float:
    """log10 of the best rate at alpha = 2 rank and rank 16."""
    return -2.0 + BY_WIDTH * math.log10(width / 128) + BY_STEPS * math.log10(steps / 48)


def records(task: scale.Task, width: int, layers: int, count: int) -> list[ScaledRecord]:
    rng = np.random.default_rng(width)
    context = {
        "hidden_size": width,
        "model_layers": layers,
        "model_parameters": 12 * layers * width**2,
        "examples": task.examples,
        "mean_tokens": 20.0,
        "method": "sft",
        "precision": "fp32",
    }
    shared = {"task": task.name, "split": task.split, "context": context}
    made = [ScaledRecord(configuration=UNTUNED, step=[0], loss=[4.0], quality=[0.0], **shared)]
    for number, one in enumerate(task.configurations()[:count]):
        rate = math.log10(one["learning_rate"]) + 0.3 * (
            0.65 * (math.log2(one["alpha_ratio"]) - 1) + 0.55 * (math.log2(one["lora_rank"]) - 4)
        )
        off = rate - best_rate(width, one["max_steps"])
        final = 0.8 * math.exp(-0.5 * (off / 0.7) ** 2) - 0.1 + rng.normal(0, 0.01)
        quality = [final / 4, final / 2, 0.8 * final, final]
        size = one["lora_rank"] * coverage(one["target_modules"])
        work = one["batch_size"] * one["max_steps"]
        made.append(
            ScaledRecord(
                configuration=number,
                parameters=one,
                step=[1, 2, 3, 4],
                loss=[4 * (1 - value) for value in quality],
                accuracy=[0.5] * 4,
                quality=quality,
                trainable_parameters=one["lora_rank"] * 100,
                cost=0.2 + work * (2 + size / 64) / 1000 + size / 100,
                seconds=1.0,
                **shared,
            )
        )
    return made


@pytest.fixture(scope="session")
def made_records() -> list[ScaledRecord]:
    models = (("48x2", 48, 2), ("tiny", 128, 4), ("256x2", 256, 2), ("512x3", 512, 3))
    lengths = ((8, 16), (32, 64), (256, 512))
    return [
        record
        for model, width, layers in models
        for turn, steps in enumerate(lengths)
        for record in records(
            scale.Task(model, "tiny:dates", (16, 256, 1024)[turn], steps, (2, 4, 8, 16)),
            width,
            layers,
            32,
        )
    ]


@pytest.fixture(scope="session")
def made_tables(made_records: list[ScaledRecord]) -> list[Table]:
    by_name: dict[str, list[ScaledRecord]] = {}
    for record in made_records:
        by_name.setdefault(record.task, []).append(record)
    return [
        table(scaled.ScaledTask(name, some[0].split, some[0].context), some, scaled.VARIED)
        for name, some in by_name.items()
    ]
