from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import costs
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.dataset import Table
from optuna_lora_rl.learning.tables.surfaces import Surfaces
from tests.learning.tables.conftest import places
from tests.learning.tables.conftest import price
from tests.learning.tables.conftest import truth

UNSEEN = design.configurations(256)[200:]


def test_the_ends_of_what_was_measured_are_0_and_1() -> None:
    for name, one in design.SPACE.items():
        if name in ("target_modules", "layers"):
            assert isinstance(one, design.Level)
            assert [coordinates.coordinate(name, value) for value in one.values] == [0, 1, 2, 3]
        else:
            ends = coordinates.bounds(name)
            assert [coordinates.coordinate(name, end) for end in ends] == [0, 1]
    assert coordinates.coordinate("lora_rank", 8) == pytest.approx(0.5)
    assert coordinates.coordinate("lora_dropout", 0.15) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_rank", 128, "lora_rank is 128, but the tables hold 1 to 64"),
        ("learning_rate", 1e-6, "learning_rate is 1e-06"),
        ("layers", "0-1", "layers is '0-1', but the tables hold all, first-half"),
    ],
)
def test_what_was_not_measured_is_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        coordinates.coordinate(name, value)


def test_costs_are_exact_for_every_configuration_of_the_design(prices: costs.Costs) -> None:
    drawn = [*UNSEEN, {**UNSEEN[0], "lora_dropout": 0.0}, {**UNSEEN[1], "batch_size": 3}]
    wanted = [price(one) for one in drawn]
    torch.testing.assert_close(prices(places(drawn))[1], torch.tensor(wanted).double())


def test_surfaces_predict_what_they_have_not_seen(fitted: Surfaces) -> None:
    predicted = fitted.quality(places(UNSEEN)).numpy()
    for row, peak in enumerate((-2.5, -4.0)):
        wanted = np.array([truth(one, peak) for one in UNSEEN])
        assert 1 - ((predicted[row] - wanted) ** 2).mean() / wanted.var() > 0.6
    curve = fitted.curve(places(UNSEEN))
    torch.testing.assert_close(curve[:, :, 0], 0.4 * curve[:, :, 3], atol=1e-6, rtol=1e-6)


def test_surfaces_pass_near_what_they_have_seen(fitted: Surfaces, tables: list[Table]) -> None:
    seen = design.configurations(90)
    predicted = fitted.quality(places(seen)).numpy()
    for row, table in enumerate(tables):
        assert np.corrcoef(predicted[row], table.quality[:90, -1])[0, 1] > 0.97


def test_divergence_is_recognised(fitted: Surfaces) -> None:
    said = fitted.diverges(places(UNSEEN)).numpy()
    for row, peak in enumerate((-2.5, -4.0)):
        wanted = np.array([truth(one, peak) < 0 for one in UNSEEN])
        assert wanted.any() and not wanted.all()
        assert (said[row] == wanted).mean() > 0.85


def test_a_table_says_the_same_alone_and_in_a_batch(fitted: Surfaces) -> None:
    x = places(UNSEEN[:7])
    for row in (0, 1):
        alone = fitted[[row]]
        assert alone.names == (fitted.names[row],)
        torch.testing.assert_close(alone.curve(x[:1]), fitted.curve(x)[[row]])
        torch.testing.assert_close(alone.cost(x[:1]), fitted.cost(x)[[row]])


def test_facts_say_how_good_a_surface_is(fits: dict[str, Any], tables: list[Table]) -> None:
    for table in tables:
        facts = fits[table.task.name]["facts"]
        assert facts["runs"] == facts["configurations"] == len(table)
        assert 0.4 < facts["r2"] <= 1 and 0.6 < facts["spearman"] <= 1
        assert facts["cost_error"] < 1e-9 and facts["noise"] is None
        assert facts["diverged"] == int((table.quality[:, -1] < -0.05).sum()) > 0
