"""A measurement: real runs with the package's own fine-tuning, and going on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import records
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import Record
from studies.tables import measuring

TASK = "tiny-narrow/plurals-small"


def test_runs_are_recorded_with_curve_and_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = {
        **design.configurations(2)[1],
        "learning_rate": 0.01,
        "batch_size": 4,
        "max_steps": 8,
    }
    monkeypatch.setattr(design, "configurations", lambda count: [brief])
    log = tmp_path / "tables.jsonl"
    measuring.measure(log, [], [TASK], 1, lambda line: None)
    untuned, first, second = records.read(log)
    assert (untuned.configuration, untuned.quality) == (UNTUNED, [0.0])
    assert (first.seed, second.seed) == (0, 1) and first.parameters == brief
    assert first.step == [2, 4, 6, 8] and first.failure is None
    assert first.quality[-1] == pytest.approx(1 - first.loss[-1] / untuned.loss[0], abs=1e-4)
    assert first.quality[-1] > 0.02 and first.quality != second.quality
    assert first.tokens > 8 * 4 * 10 and first.flops > 1e8 and 0 < first.cost < 1
    assert first.trainable_parameters > 0


class _Tuners:
    """Stands where the fine-tuning would be: notes what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int, int]] = []
        monkeypatch.setattr(measuring, "tuner", lambda task: self)
        monkeypatch.setattr(measuring, "untuned", self._untuned)
        monkeypatch.setattr(measuring, "run", self._run)

    def prepare(self) -> None:
        pass

    def _untuned(self, task: str, own: Any) -> Record:
        return Record(task=task, configuration=UNTUNED)

    def _run(self, task: str, number: int, seed: int, parameters: Any, own: Any) -> Record:
        self.asked.append((task, number, seed))
        return Record(
            task=task, configuration=number, seed=seed, parameters=parameters, quality=[0.1]
        )


def test_a_stopped_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuners, log = _Tuners(monkeypatch), tmp_path / "tables.jsonl"
    tasks = [TASK, "tiny/dates-small"]
    known = [
        Record(task=TASK, configuration=0, parameters=design.configurations(1)[0]),
        Record(task=TASK, configuration=UNTUNED),
    ]
    measuring.measure(log, known, tasks, 2, lambda line: None)
    assert tuners.asked == [one for one in design.order(tasks, 2) if one != (TASK, 0, 0)]
    tuners.asked.clear()
    measuring.measure(log, [*known, *records.read(log)], tasks, 2, lambda line: None)
    assert tuners.asked == []


def test_records_of_another_design_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Tuners(monkeypatch)
    other = Record(task=TASK, configuration=0, parameters={"lora_rank": 3})
    with pytest.raises(UserError, match="Configuration 0 of tiny-narrow/plurals-small"):
        measuring.measure(tmp_path / "log", [other], [TASK], 1, lambda line: None)
