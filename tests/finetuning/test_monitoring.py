"""What a run keeps of its layers and of its training loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult

SHORT = {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-2, "lora_rank": 2}


def test_a_run_keeps_what_was_read_of_its_layers(make_tuner: Callable[..., FineTuner]) -> None:
    tuner = make_tuner(monitor=3)
    read = json.loads(json.dumps(tuner.run({**SHORT, "target_modules": "qv"}).monitor))
    assert [row["step"] for row in read["course"]] == [0, 2, 4]
    # B is zero at the start, so the adapter has no effect yet.
    norms = [row["weight_norm"] for row in read["course"]]
    assert norms[0] == 0 and 0 < norms[1] < norms[2]
    assert len(read["layers"]) == 4 and {row["rank"] for row in read["layers"]} == {2}
    assert read["course"][0]["parameters"] == sum(row["parameters"] for row in read["layers"])


def test_no_reading_changes_the_run(make_tuner: Callable[..., FineTuner]) -> None:
    unread, often = (make_tuner(monitor=count).run(SHORT) for count in (0, 100))
    assert unread.monitor == {} and len(often.monitor["course"]) == 6
    assert unread.curve == often.curve


def test_the_training_loss_is_a_mean_over_whole_steps(
    make_tuner: Callable[..., FineTuner],
) -> None:
    whole, in_parts = (
        make_tuner(evaluations=1, micro_batch_size=size).run({**SHORT, "batch_size": 4})
        for size in (4, 1)
    )
    (found,), (same,) = ([row["train_loss"] for row in one.curve] for one in (whole, in_parts))
    assert found == pytest.approx(same, rel=1e-3)
    assert found > whole.metrics["loss"]


def test_runs_side_by_side_are_read_as_alone(tuner: FineTuner) -> None:
    runs = [TrialRequest(i, {**SHORT, "lora_rank": 2 + i}) for i in range(2)]
    waiting, outcomes = iter(runs), {}

    def done(run: TrialRequest, outcome: Any) -> None:
        outcomes[run.number] = outcome

    tuner.run_packed(lambda: next(waiting, None), done, size=2)
    for run in runs:
        found, expected = outcomes[run.number], tuner.run(run.configuration)
        assert isinstance(found, TrialResult)
        for ours, theirs in zip(found.curve, expected.curve, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for ours, theirs in zip(found.monitor["layers"], expected.monitor["layers"], strict=True):
            assert ours["layer"] == theirs["layer"] and ours["rank"] == run.number + 2
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)
