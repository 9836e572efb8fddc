"""Runs of all kinds, side by side and alone."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult

Make = Callable[..., FineTuner]
Hash = Callable[[FineTuner], str]
Write = Callable[..., str]
Options = dict[str, Any]
QUICK: Options = {"max_steps": 3, "learning_rate": 5e-3}
DIVERGES: Options = {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"}
# Different in everything that may differ within a pack.
MIXED: list[Options] = [
    {},
    {"lora_rank": 1, "lora_alpha": 3.0},
    {"lora_rank": 16, "lora_alpha": 4.0, "target_modules": "qv"},
    {"lora_rank": 7, "use_rslora": True, "target_modules": "attention"},
    {"target_modules": "mlp", "lora_dropout": 0.3},
    {"layers": "last-half", "lora_dropout": 0.1, "lora_rank": 2},
    {"layers": "0", "lora_dropout": 0.5, "target_modules": "qv"},
    {"batch_size": 3, "max_steps": 7},
    {"batch_size": 16, "lora_dropout": 0.2, "max_steps": 2},
    {"batch_size": 1, "max_steps": 1},
    {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"init_lora_weights": "orthogonal", "lora_rank": 4},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "pissa", "lora_rank": 4},
    {"init_lora_weights": "pissa_niter_4", "lora_dropout": 0.2, "use_rslora": True},
    {"init_lora_weights": "olora", "target_modules": "qv", "lora_dropout": 0.1},
    {"loraplus_lr_ratio": 8.0, "weight_decay": 0.1},
    {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_ratio": 0.5},
    {"optim": "sgd", "max_grad_norm": 1e-3, "lr_scheduler_type": "constant"},
    {"max_steps": 0, "num_train_epochs": 0.5},
]


class Pruned(Exception):
    pass


def packed(
    tuner: FineTuner,
    runs: Sequence[TrialRequest],
    *,
    size: int | None = 8,
    done: Callable[[TrialRequest, Any], None] | None = None,
) -> tuple[list[Any], list[str]]:
    """Returns the outcomes in the order of the runs, and the notes."""
    waiting, outcomes, notes = iter(runs), {}, []

    def ended(run: TrialRequest, outcome: Any) -> None:
        assert run.number not in outcomes
        outcomes[run.number] = outcome
        if done is not None:
            done(run, outcome)

    tuner.run_packed(lambda: next(waiting, None), ended, size=size, says=notes.append)
    return [outcomes[run.number] for run in runs], notes


def runs_of(configurations: Sequence[Options], folder: Path | None = None) -> list[TrialRequest]:
    return [
        TrialRequest(
            i, {**QUICK, **configuration}, folder=None if folder is None else folder / f"{i}"
        )
        for i, configuration in enumerate(configurations)
    ]


def alone(tuner: FineTuner, run: TrialRequest, folder: Path | None = None) -> TrialResult:
    return tuner.run(run.configuration, seed=run.seed, report=run.report, folder=folder)


def assert_same(found: Any, expected: TrialResult) -> None:
    assert isinstance(found, TrialResult), found
    assert len(found.curve) == len(expected.curve)
    for ours, theirs in zip(found.curve, expected.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
    for name in ("quality", "score", "cost"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    for name in ("steps", "flops", "bytes", "trainable_parameters", "stopped_early"):
        assert getattr(found, name) == getattr(expected, name), name
