from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import tiny
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import ScaledRecord
from optuna_lora_rl.learning.tables.records import read
from studies.tables import scale
from studies.tables import scale_measuring
from studies.tiny.pretraining import RECIPES

TASKS = list(scale.TASKS.values())


def test_there_are_sixty_tables_of_many_widths_depths_lengths_and_sizes() -> None:
    small = {task.model for task in TASKS} - {scale.REAL_MODEL}
    widths = {RECIPES[model].width for model in small}
    assert len(TASKS) >= 60 and len(widths) >= 6 and min(widths) == 48 and max(widths) == 512
    assert {RECIPES[model].layers for model in small} >= {2, 8}
    assert {step for task in TASKS for step in task.steps} >= {8, 512}
    assert {task.examples for task in TASKS} >= {16, 4000}
    real = [task for task in TASKS if task.model == scale.REAL_MODEL]
    assert len(real) == 8 and {task.steps for task in real} == {(24,), (96,)}
    assert {task.examples for task in real} == {64, 512}


def test_widths_a_length_families_and_real_tasks_are_kept_out_of_training() -> None:
    train = [task for task in TASKS if task.split == "train"]
    held = {task.model for task in TASKS} - {task.model for task in train}
    assert held == set(scale.HELD_MODELS)
    assert not any(set(task.steps) & set(scale.HELD_STEPS) for task in train)
    assert not {"cipher", "plurals", "sources", "reviews", "units"} & {t.family for t in train}
    assert {task.data for task in train if task.model == scale.REAL_MODEL} == {
        "real:dates",
        "real:extraction",
    }


@pytest.mark.parametrize("task", TASKS[::7], ids=lambda task: task.name)
def test_a_design_covers_its_space_from_its_first_points_on(task: scale.Task) -> None:
    drawn = task.configurations()
    assert len(drawn) == scale.CONFIGURATIONS and drawn == task.configurations()
    for some in (drawn[:16], drawn):
        rates = sorted(one["learning_rate"] for one in some)
        assert rates[0] < 5e-4 and rates[-1] > 5e-2
        middle = [rate for rate in rates if 5e-4 <= rate <= 5e-2]
        assert 0.45 < len(middle) / len(some) < 0.75
        for name in ("batch_size", "max_steps", "target_modules"):
            assert len({one[name] for one in some}) == len(task.space[name].values)
    assert any(one["lora_dropout"] for one in drawn) == (task.examples <= 64)


def test_each_run_stands_once_and_second_seeds_come_once_the_surface_is_there() -> None:
    runs = scale.runs()
    assert len(runs) == len(set(runs)) == scale.CONFIGURATIONS + 6
    assert {seed for _, seed in runs[:32]} == {0}


def record(task: scale.Task, number: int, seconds: float) -> ScaledRecord:
    return ScaledRecord(
        task=task.name, split=task.split, configuration=number, seconds=seconds, quality=[0.5]
    )


def test_tables_grow_side_by_side_and_the_real_model_gets_a_third_of_the_time() -> None:
    quick, slow, real = TASKS[10], TASKS[20], TASKS[0]
    costs = {quick.name: 1.0, slow.name: 9.0, real.name: 30.0}
    known: list[ScaledRecord] = []
    for number in range(90):
        task = scale_measuring.following(known, [real, quick, slow])
        assert task is not None
        known.append(record(task, number, costs[task.name]))
    spent = {name: sum(r.seconds for r in known if r.task == name) for name in costs}
    assert 0.25 < spent[real.name] / sum(spent.values()) < 0.42
    counts = [sum(r.task == task.name for r in known) for task in (quick, slow)]
    assert 2 < counts[0] / counts[1] < 4.5


def test_models_that_are_not_there_wait(tmp_path: Path) -> None:
    names = {task.model for task in scale_measuring.ready(tmp_path)}
    assert names == {*tiny.MODELS, scale.REAL_MODEL}
    (tmp_path / "48x2").mkdir()
    (tmp_path / "48x2" / "README.md").touch()
    assert "48x2" in {task.model for task in scale_measuring.ready(tmp_path)}


TASK = scale.Task("tiny-narrow", "tiny:dates", 16, (8,), (2, 4))


def only(monkeypatch: pytest.MonkeyPatch, task: scale.Task, runs: int) -> None:
    monkeypatch.setattr(scale, "TASKS", {task.name: task})
    first = scale.runs()[:runs]
    monkeypatch.setattr(scale, "runs", lambda: first)


def test_runs_are_recorded_with_curve_and_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, TASK, 2)
    said: list[str] = []
    scale_measuring.measure(tmp_path, said.append)
    untuned, first, second = read(tmp_path / scale.LOG, ScaledRecord)
    assert (untuned.configuration, untuned.quality) == (UNTUNED, [0.0])
    assert [first.parameters, second.parameters] == TASK.configurations()[:2]
    assert first.step == [2, 4, 6, 8] and first.failure is None and len(said) == 2
    assert first.quality[-1] == pytest.approx(1 - first.loss[-1] / untuned.loss[0], abs=1e-4)
    known = first.context
    assert (known["hidden_size"], known["model_layers"], known["examples"]) == (64, 3, 16)
    assert known["precision"] == "fp32" and 5 < known["mean_tokens"] < 64
    assert first.cost > 0 and first.flops > 0 and first.trainable_parameters > 0


def test_a_stopped_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, TASK, 10)
    log = tmp_path / scale.LOG
    stops = itertools.count()

    def run(task: scale.Task, number: int, seed: int, *rest: Any) -> ScaledRecord:
        if next(stops) == 6:
            raise KeyboardInterrupt
        return record(task, number, 1.0)

    monkeypatch.setattr(scale_measuring, "run", run)
    monkeypatch.setattr(scale_measuring, "_prepared", lambda *given: None)
    monkeypatch.setattr(scale_measuring, "untuned", lambda task, own: record(task, UNTUNED, 0.0))
    quiet: Callable[[str], None] = lambda line: None  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        scale_measuring.measure(tmp_path, quiet)
    before = read(log, ScaledRecord)
    assert len(before) == 7
    with log.open("a") as file:
        file.write('{"task": "torn')
    scale_measuring.measure(tmp_path, quiet, known=before[:2])
    numbers = [one.configuration for one in read(log, ScaledRecord)]
    assert sorted(numbers) == [UNTUNED, *range(10)]


def test_four_thousand_examples_are_new_and_none_is_validated_on(tmp_path: Path) -> None:
    task = scale.Task("tiny-narrow", "tiny:dates", 4000, (8,), (2,))
    paths = scale_measuring._rows(task, tmp_path)
    from optuna_lora_rl.finetuning import files

    train, validation = (
        {row["prompt"] for row in files.read(Path(paths[name]), "data", None)}
        for name in ("train", "validation")
    )
    assert len(train) == 4000
    kept = {row["prompt"] for row in tiny.load("dates-ample", "validation")}
    kept_test = {row["prompt"] for row in tiny.load("dates-ample", "test")}
    assert validation == kept and not train & kept and not train & kept_test
