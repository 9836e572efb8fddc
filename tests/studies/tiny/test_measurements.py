from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optuna_lora_rl.finetuning.errors import FineTuningError
from studies.tiny import measurements
from studies.tiny.measurements import Plan

PLAN = Plan(configurations=4, seeds=3, steps=7)


class LearningRateTuner:
    """Loses least at a learning rate of 1e-3; the seed shifts the loss a little."""

    def __init__(self, *, fails_above: float = math.inf, stops_after: float = math.inf) -> None:
        self.calls: list[dict[str, Any]] = []
        self._fails_above = fails_above
        self._stops_after = stops_after

    def baseline(self) -> SimpleNamespace:
        return SimpleNamespace(loss=10.0)

    def run(self, configuration: dict[str, Any], *, seed: int, report: Any) -> SimpleNamespace:
        if len(self.calls) >= self._stops_after:
            raise KeyboardInterrupt
        self.calls.append(configuration)
        report(7, 0.0, {})
        if configuration["learning_rate"] > self._fails_above:
            raise FineTuningError("diverged", "the loss is no number")
        loss = abs(math.log10(configuration["learning_rate"]) + 3) + 0.01 * seed
        return SimpleNamespace(metrics={"loss": loss}, seconds=1.234)


def test_every_run_is_recorded_once(tmp_path: Path) -> None:
    records, tuner = tmp_path / "records.jsonl", LearningRateTuner()
    measurements.measure("dates-small", PLAN, records, tuner)
    runs = measurements.read(records)
    assert len(runs) == 1 + 1 + 4 + 2  # untuned, default, random, the best again
    assert len({run.key for run in runs}) == len(runs)
    assert all(call["max_steps"] == 7 for call in tuner.calls)
    measurements.measure("dates-small", PLAN, records, tuner)
    assert measurements.read(records) == runs


def test_the_best_is_repeated_over_seeds(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    measurements.measure("dates-small", PLAN, records, LearningRateTuner())
    runs = measurements.read(records)
    best = measurements.best_configuration(runs)
    assert [run.seed for run in runs if run.configuration == best] == [0, 1, 2]


def test_a_stopped_measurement_goes_on(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measurements.measure("dates-small", PLAN, records, LearningRateTuner(stops_after=3))
    assert len(measurements.read(records)) == 4
    again = LearningRateTuner()
    measurements.measure("dates-small", PLAN, records, again)
    assert len(again.calls) == 4
    straight = tmp_path / "straight.jsonl"
    measurements.measure("dates-small", PLAN, straight, LearningRateTuner())
    assert measurements.read(straight) == measurements.read(records)


def test_failed_runs_are_recorded_with_their_reason(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    measurements.measure("dates-small", PLAN, records, LearningRateTuner(fails_above=1e-9))
    runs = measurements.read(records)
    assert {run.failure for run in runs if run.configuration != "untuned"} == {"diverged"}
    assert measurements.best_configuration(runs) is None


def test_all_tasks_are_measured_with_the_same_configurations() -> None:
    parameters = PLAN.parameters()
    assert parameters == PLAN.parameters()
    assert list(parameters) == ["default", "random-00", "random-01", "random-02", "random-03"]
    assert parameters["default"]["lora_rank"] == 8
    assert parameters["default"]["learning_rate"] == pytest.approx(2e-4)
    longer = Plan(configurations=6).parameters()
    assert {name: longer[name] for name in parameters} == parameters


def test_runs_of_other_lengths_do_not_count(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    measurements.measure("dates-small", PLAN, records, LearningRateTuner())
    longer = LearningRateTuner()
    measurements.measure("dates-small", Plan(configurations=4, seeds=3, steps=9), records, longer)
    assert len(longer.calls) == 7
