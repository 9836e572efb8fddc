"""The shipped tables: whole, of this design, and described as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optuna_lora_rl.learning.tables import costs
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.learning.tables.coordinates import matrix
from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.problem import TableProblem
from optuna_lora_rl.learning.tables.surfaces import Surfaces
from studies.tables import fitting

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tables.md"


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    return dataset.load()


@pytest.fixture(scope="module")
def shipped() -> Surfaces:
    return surfaces.load()


def test_every_task_has_a_table_of_this_design(tables: list[Table]) -> None:
    drawn = design.configurations()
    assert [table.task.name for table in tables] == list(design.TASKS)
    for table in tables:
        first = table.configuration[table.seed == 0]
        assert len(first) >= 40 and first.tolist() == list(range(len(first)))
        for row, number in enumerate(table.configuration):
            assert {name: table.parameters[name][row] for name in design.SPACE} == drawn[number]


def test_what_was_measured_is_sound(tables: list[Table]) -> None:
    for table in tables:
        done = table.failure == ""
        assert np.isfinite(table.quality[done]).all() and (table.quality[done] <= 1).all()
        assert (np.diff(table.step[done], axis=1) >= 0).all()
        expected = 1 - table.loss[done, -1] / table.untuned
        np.testing.assert_allclose(table.quality[done, -1], expected, atol=1e-3)
        assert 1 < table.untuned < 9 and (table.cost > 0).all()
        # There is something to tune, in every task.
        assert table.quality[done, -1].max() > np.median(table.quality[done, -1]) + 0.03


def test_splits_are_told_apart_by_family() -> None:
    names = {
        split: {table.task.family for table in dataset.load(split)} for split in design.SPLITS
    }
    assert names == {split: set(families) for split, families in design.SPLITS.items()}


def test_counted_costs_are_those_that_were_measured(
    tables: list[Table], shipped: Surfaces
) -> None:
    for row, table in enumerate(tables):
        x = torch.from_numpy(matrix(table.parameters))[None]
        counted = shipped.price[[row]](x)[0].numpy()
        np.testing.assert_allclose(counted, table.cost, rtol=2e-3)


def test_the_page_tells_what_is_shipped() -> None:
    assert fitting.markdown(dataset.FILE, surfaces.FITS) in PAGE.read_text(encoding="utf-8")
    size = sum(file.stat().st_size for file in (dataset.FILE, surfaces.FITS, costs.FILE))
    assert size < 10e6


@pytest.mark.parametrize("task", ["tiny/dates-small", "tiny-wide/cipher-small"])
def test_a_shipped_problem_has_a_best_above_its_median(task: str) -> None:
    problem = TableProblem(task)
    assert problem.best > problem.median + 0.05
    assert problem.regret(problem.evaluate(problem.best_params)) == pytest.approx(0)
