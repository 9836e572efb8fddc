from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl import TuningContext
from optuna_lora_rl.learning.measured import Slice
from optuna_lora_rl.learning.measured import draw_slice
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.prior import GUIDE_LR

TARGETS = ("qv", "all-linear")


class HandMade:
    """Best at a learning rate of 1e-2 with all layers adapted; diverges above 5e-2."""

    name = "hand-made"
    noise = 0.01
    dimensions = make_space(
        [
            Dimension("learning_rate", "float", 1e-4, 1e-1, log=True),
            Dimension("lora_rank", "int", 1.0, 64.0, log=True),
            Dimension("alpha_ratio", "float", 0.25, 8.0, log=True),
            Dimension("target_modules", "categorical", choices=TARGETS),
        ]
    ).dimensions

    def __init__(self) -> None:
        self.context: TuningContext | None = None

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offset = np.log10(x[:, 0]) + 2.0 + 0.5 * (np.log2(x[:, 2]) - 1.0)
        value = -(offset**2) + 0.2 * np.log2(x[:, 1]) / 6.0 + 0.3 * x[:, 3]
        return value, x[:, 0] > 5e-2

    def cost(self, x: np.ndarray) -> np.ndarray:
        return x[:, 1] / 64.0


SURFACE = HandMade()


def _cut(space: list[Dimension], columns: tuple[int, ...], **changes: object) -> Slice:
    fixed = np.array([1e-2, 8.0, 2.0, 1.0])
    values: dict = {"shift": 0.0, "price": 0.0, **changes}
    return Slice(SURFACE, make_space(space), columns, fixed, **values)


def test_a_slice_sees_the_configuration_that_its_task_means() -> None:
    rate = Dimension("learning_rate", "float", 1e-3, 1e-1, log=True)
    target = Dimension("target_modules", "categorical", choices=("all-linear", "qv"))
    cut = _cut([rate, target], (0, -1, -1, 1))
    x = np.array([cut.space.encode({"learning_rate": 1e-2, "target_modules": t}) for t in TARGETS])
    natural = cut.natural(x)
    assert natural[:, 0] == pytest.approx([1e-2, 1e-2])
    assert natural[:, 1:3].tolist() == [[8.0, 2.0], [8.0, 2.0]]
    assert natural[:, 3].tolist() == [0.0, 1.0]


def test_alpha_is_measured_as_its_ratio_to_the_rank() -> None:
    rank = Dimension("lora_rank", "int", 2.0, 64.0, log=True)
    alpha = Dimension("lora_alpha", "int", 1.0, 256.0, log=True)
    cut = _cut([rank, alpha], (-1, 0, 1, -1))
    pairs = [(8, 16), (32, 16), (64, 1)]
    x = np.array([cut.space.encode({"lora_rank": r, "lora_alpha": a}) for r, a in pairs])
    # Beyond the measured ratios stands the nearest of them.
    assert cut.natural(x)[:, 2].tolist() == pytest.approx([2.0, 0.5, 0.25])


def test_a_label_moves_the_learning_rate_and_not_the_measurements() -> None:
    cut = _cut(
        [Dimension("learning_rate", "float", 1e-5, 1e-3, log=True)], (0, -1, -1, -1), shift=-2.0
    )
    x = cut.space.encode({"learning_rate": 1e-4})[None]
    assert float(cut.natural(x)[0, 0]) == pytest.approx(1e-2)


def test_a_price_charges_for_the_adapter() -> None:
    space = [Dimension("lora_rank", "int", 1.0, 64.0, log=True)]
    x = np.linspace(0.05, 0.95, 9)[:, None]
    free, _ = _cut(space, (-1, 0, -1, -1))(x)
    dear, _ = _cut(space, (-1, 0, -1, -1), price=1.0)(x)
    assert (np.diff(free) > 0).all()
    assert (np.diff(dear - free) < 0).all()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_diverges_fails_where_the_task_says_so(fails: bool) -> None:
    space = [Dimension("learning_rate", "float", 1e-3, 1e-1, log=True)]
    value, failed = _cut(space, (0, -1, -1, -1), fails=fails)(np.array([[0.5], [0.99]]))
    assert failed.tolist() == [False, fails]
    assert value[0] > value[1]


def test_drawn_slices_differ_in_space_scale_and_price() -> None:
    rng = np.random.default_rng(1)
    cuts = [draw_slice(rng, [SURFACE]) for _ in range(60)]
    assert len({len(cut.space) for cut in cuts}) >= 3
    assert 25 < sum(cut.shift != 0.0 for cut in cuts) < 55
    assert 30 < sum(cut.price > 0 for cut in cuts) < 58
    assert any("alpha" in cut.space.role_columns for cut in cuts)
    assert any("alpha_ratio" in cut.space.role_columns for cut in cuts)


def test_tasks_are_cut_out_of_tables_and_their_best_is_where_it_was_measured() -> None:
    tasks = draw_tasks(60, 3, [SURFACE], measured=0.4)
    measured = [task for task in tasks if task.group == "measured"]
    assert 8 <= len(measured) <= 30
    for task in measured:
        cut = task.cut
        assert cut is not None
        if {"learning_rate"} == set(cut.space.role_columns):
            wanted = -2.0 - 0.5 * (np.log2(cut.fixed[2]) - 1.0) + cut.shift
            assert float(task.truth[1]) + GUIDE_LR == pytest.approx(wanted, abs=0.3)
    scores = [task.score(task.layout.default[None])[0][0] for task in tasks]
    assert np.isfinite(scores).all()
    assert max(scores) < 1.05


def test_the_same_seed_and_surfaces_give_the_same_tasks() -> None:
    first, again = (draw_tasks(20, 4, [SURFACE]) for _ in range(2))
    assert [task.best for task in first] == [task.best for task in again]
    assert [task.space for task in first] == [task.space for task in again]
