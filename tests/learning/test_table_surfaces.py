from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl.learning import table_surfaces
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.policy.dimensions import Space

SPACE = Space(table_surfaces.DIMENSIONS)


def test_natural_values_stand_where_the_tables_put_them() -> None:
    configurations = design.configurations(32)
    natural = []
    for configuration in configurations:
        row = []
        for dimension in table_surfaces.DIMENSIONS:
            value = configuration[dimension.name]
            row.append(float(value) if dimension.is_ordered else dimension.levels.index(value))
        natural.append(row)
    mine = table_surfaces._coordinates(np.array(natural, dtype=float))[0].numpy()
    theirs = np.stack([coordinates.point(configuration) for configuration in configurations])
    assert mine == pytest.approx(theirs, abs=1e-4)


def test_every_measured_parameter_has_its_role() -> None:
    assert set(SPACE.role_columns) == {
        "rank",
        "alpha_ratio",
        "learning_rate",
        "dropout",
        "targets",
        "layers",
        "batch_size",
        "steps",
        "weight_decay",
    }


@pytest.mark.parametrize(
    ("facts", "good"),
    [
        ({"configurations": 400, "spearman": 0.9}, True),
        ({"configurations": 400, "spearman": 0.3}, False),
        ({"configurations": 400, "spearman": None}, False),
        ({"configurations": 12, "spearman": 0.9}, False),
    ],
)
def test_surfaces_that_predict_nothing_are_left_out(
    facts: dict[str, float | None], good: bool
) -> None:
    assert table_surfaces.is_good(facts) is good
