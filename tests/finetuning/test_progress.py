from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.progress import Progress


def progress(**changes: Any) -> Progress:
    settings: dict[str, Any] = {
        "metric": "loss",
        "numbers": defaultdict(lambda: 3),
        "baselines": defaultdict(lambda: Evaluation(loss=4.0, token_accuracy=0.0)),
        "charge": 0.25,
        "steps": 100,
        "patience": 0,
        "generate": lambda step: {},
        "report": None,
    }
    return Progress(**{**settings, **changes})


def metrics(loss: float) -> dict[str, float]:
    return {"eval_loss": loss, "eval_mean_token_accuracy": 0.5}


def test_each_evaluation_is_scored_and_reported() -> None:
    seen: list[Any] = []
    run = progress(report=lambda *report: seen.append(report))
    assert not run.evaluated(50, 0.5, metrics(3.0))
    told = {"loss": 3.0, "token_accuracy": 0.5, "quality": 0.25}
    assert run.curve == [{"step": 50, "epoch": 0.5, **told, "score": 0, "untuned_loss": 4.0}]
    assert seen == [(50, 0.0, {**told, "evaluation": 3})]


@pytest.mark.parametrize(
    ("patience", "losses", "stops"),
    [
        (0, [3.0, 3.1, 3.2, 3.3], [False] * 4),
        (1, [3.0, 2.0, 2.5], [False, False, True]),
        (2, [3.0, 3.1, 2.9, 3.0, 2.9], [False, False, False, False, True]),
    ],
)
def test_patience_counts_evaluations_since_the_best(
    patience: int, losses: list[float], stops: list[bool]
) -> None:
    run = progress(patience=patience)
    assert [run.evaluated(i, 0.0, metrics(loss)) for i, loss in enumerate(losses, 1)] == stops
    assert run.stopped_early == stops[-1]


def test_the_last_step_is_no_early_stop() -> None:
    run = progress(patience=1, steps=2)
    run.evaluated(1, 0.0, metrics(3.0))
    assert not run.evaluated(2, 0.0, metrics(3.5))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_divergence(loss: float) -> None:
    with pytest.raises(FineTuningError) as failed:
        progress().evaluated(7, 0.0, metrics(loss))
    assert failed.value.reason == "diverged"
    assert "step 7" in failed.value.message
