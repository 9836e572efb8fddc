from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from optuna_lora_rl.learning import scaled_surfaces
from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.records import ScaledRecord
from studies.tables import scale_fitting
from studies.tables.__main__ import main
from tests.studies.tables.conftest import BY_STEPS
from tests.studies.tables.conftest import BY_WIDTH
from tests.studies.tables.conftest import best_rate

Fits = tuple[list[scale_fitting.Fit], scale_fitting.Regression]


@pytest.fixture(scope="module")
def fitted(made_tables: list[Table]) -> Fits:
    return scale_fitting.fit_all(made_tables, lambda line: None)


def test_best_rates_are_found(fitted: Fits) -> None:
    for one in fitted[0]:
        truth = best_rate(one.known["hidden_size"], one.known["steps"])
        assert one.rate == pytest.approx(truth, abs=0.15), one.table.task.name
        assert one.r2 > 0.9 and one.deviation < 0.2


def test_the_regression_finds_what_moves_them(fitted: Fits) -> None:
    regression = fitted[1]
    found = dict(zip(scale_fitting.NAMES, regression.coefficients, strict=True))
    assert found["width"] == pytest.approx(BY_WIDTH, abs=0.12)
    assert found["steps"] == pytest.approx(BY_STEPS, abs=0.12)
    assert found["one"] == pytest.approx(-2.0, abs=0.1)
    assert abs(found["batch"]) < 0.1
    low, high = regression.intervals.T
    assert (low <= regression.coefficients).all() and (regression.coefficients <= high).all()
    width = scale_fitting.NAMES.index("width")
    assert low[width] < BY_WIDTH < high[width] and high[width] < -0.2


def test_a_regressor_can_be_left_out(fitted: Fits) -> None:
    fits, regression = fitted
    fewer = scale_fitting.solved(fits, regression.coefficients, ("examples",), 0)
    assert fewer.coefficients[scale_fitting.NAMES.index("examples")] == 0
    found = dict(zip(scale_fitting.NAMES, fewer.coefficients, strict=True))
    # In these tables longer runs have more examples, so that steps stand for both.
    assert found["steps"] == pytest.approx(BY_STEPS, abs=0.1)


def test_one_command_compiles_fits_and_tells(
    tmp_path: Path, made_records: list[ScaledRecord]
) -> None:
    compiled, fits, page = (tmp_path / name for name in ("t.parquet", "t.json", "t.md"))
    empty = ["--folder", str(tmp_path), "--compiled", str(compiled)]
    assert main(["scale", "compile", *empty]) == 1
    scaled.write(compiled, made_records)
    given = ["--compiled", str(compiled), "--fits", str(fits), "--page", str(page), "--alone"]
    assert main(["scale", "fit", *given]) == 0
    tables = json.loads(fits.read_text())["tables"]
    assert len(tables) == 12
    text = page.read_text()
    assert all(f"`{name}`" in text for name in tables) and "384 runs of 12 tables" in text
    loaded = scaled.load(path=compiled)
    for table in loaded:
        surface = scaled_surfaces.ScaledSurface(table, tables[table.task.name])
        x = np.array([_places(surface, table, row) for row in range(len(table))])
        quality, diverged = surface(x)
        measured = scaled_surfaces.quality(table)
        assert np.corrcoef(quality, measured)[0, 1] > 0.95
        assert diverged.tolist() == (quality < scaled_surfaces.DIVERGED).tolist()
        np.testing.assert_allclose(surface.cost(x), table.cost, rtol=0.1)
        assert surface.context.hidden_size == table.task.context["hidden_size"]


def _places(surface: scaled_surfaces.ScaledSurface, table: Table, row: int) -> list[float]:
    """One run's natural values in the order of the surface's dimensions."""
    values = [table.parameters[one.name][row] for one in surface.dimensions]
    choices = scaled_surfaces.TARGETS
    return [choices.index(v) if isinstance(v, str) else float(v) for v in values]
