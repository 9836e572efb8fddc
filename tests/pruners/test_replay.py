"""The replay of recorded curves, on curves whose outcome is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    for name in ("curves", "replaying"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import replaying  # type: ignore[import-not-found]

    return replaying


def task(replaying: Any, runs: int = 16) -> Any:
    end = np.linspace(0.2, 0.9, runs)
    quality = end[:, None] - 0.4 * np.arange(1, 9) ** -0.75
    return replaying.Task("made-up", quality, np.linspace(1.0, 2.0, runs), noise=0.01)


@pytest.mark.parametrize("workers", [1, 8])
def test_without_a_pruner_nothing_is_saved_and_nothing_lost(replaying: Any, workers: int) -> None:
    setting = replaying.Setting("none", {}, workers)
    order = np.random.default_rng(0).permutation(16)
    done, completed = replaying.replay(task(replaying), order, setting)
    assert done == 16 * 8
    assert sorted(completed) == list(range(16))


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("name", ["async-halving", "peer-median", "cost-aware"])
def test_parallel_curves_are_pruned_at_no_regret(replaying: Any, name: str, workers: int) -> None:
    setting = replaying.Setting(name, {}, workers)
    outcome = replaying.measure_all([task(replaying)], setting, orders=3, trials=16)
    assert (outcome[:, :, 0] > 0.1).all()
    assert (outcome[:, :, 1:3] == 0).all()


def test_a_budget_ends_a_study(replaying: Any) -> None:
    setting = replaying.Setting("none", {}, 1)
    done, completed = replaying.replay(task(replaying), np.arange(16), setting, budget=20)
    assert done == 20
    assert completed == [0, 1]


def test_the_hypervolume_is_an_area(replaying: Any) -> None:
    points = np.array([[1.0, 1.0], [3.0, 2.0], [2.0, 3.0], [0.5, 0.5]])
    # Beyond the corner (0, 4): 0.5 x 3.5, then 0.5 x 3, then 2 x 2; one point is dominated.
    assert replaying.hypervolume(points, np.array([0.0, 4.0])) == pytest.approx(7.25)


def test_what_was_recorded_can_be_read_and_replayed(replaying: Any) -> None:
    import curves  # type: ignore[import-not-found]

    recorded = curves.read(STUDIES / "curves.jsonl")
    tasks = replaying.tasks_of(recorded, (*curves.VALIDATION, *curves.TEST))
    assert len(tasks) == 8
    for each in tasks:
        assert each.quality.shape == (len(each.cost), 8)
        assert np.isfinite(each.quality).all()
