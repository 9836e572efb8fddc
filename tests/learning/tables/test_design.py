from __future__ import annotations

from collections import Counter

import pytest

from optuna_lora_rl import tiny
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.design import TASKS


def test_every_family_is_measured_in_both_sizes_on_two_models() -> None:
    assert tuple(sorted(tiny.FAMILIES)) == design.FAMILIES
    for family in design.FAMILIES:
        own = [task for task in TASKS.values() if task.family == family]
        assert {task.size for task in own} == {"small", "ample"}
        assert len({task.model for task in own}) == 2
    models = Counter(task.model for task in TASKS.values())
    assert set(models) == set(tiny.MODELS) and max(models.values()) - min(models.values()) <= 1


def test_families_are_split_once_and_real_text_is_in_training_and_test() -> None:
    assert [len(families) for families in design.SPLITS.values()] == [8, 2, 3]
    assert len(set(design.FAMILIES)) == 13
    assert "docstrings" in design.SPLITS["train"] and "sources" in design.SPLITS["test"]
    assert TASKS["tiny-wide/cipher-small"].split == "test"


def test_the_first_configurations_are_the_same_however_many_there_are() -> None:
    every = design.configurations()
    assert len(every) == 400 and every[:40] == design.configurations(40)
    # Pinned: a measurement that goes on elsewhere has to draw these again.
    assert every[0] == {
        "lora_rank": 32,
        "alpha_ratio": 0.66508,
        "learning_rate": 0.00013138,
        "lora_dropout": 0.17763,
        "target_modules": "all-linear",
        "layers": "middle",
        "batch_size": 8,
        "max_steps": 64,
        "weight_decay": 0.055822,
    }


def test_configurations_cover_the_space_evenly() -> None:
    every = design.configurations()
    for name, one in design.SPACE.items():
        values = [configuration[name] for configuration in every]
        if isinstance(one, design.Level):
            counts = Counter(values)
            assert set(counts) == set(one.values)
            assert max(counts.values()) - min(counts.values()) <= 3
        else:
            assert one.low <= min(values) <= one.at(0.02)
            assert one.at(0.98) <= max(values) <= one.high


def test_alpha_follows_from_rank_and_ratio() -> None:
    said = design.tuned({"lora_rank": 8, "alpha_ratio": 2.0, "max_steps": 16})
    assert said == {"lora_rank": 8, "lora_alpha": 16.0, "max_steps": 16}


@pytest.mark.parametrize("count", [3, 40, 60, 400])
def test_tables_grow_side_by_side(count: int) -> None:
    tasks = list(TASKS)[:3]
    order = list(design.order(tasks, count))
    assert len(set(order)) == len(order)
    assert Counter((task, seed) for task, _, seed in order) == {
        (task, seed): count if seed == 0 else min(count, 40) for task in tasks for seed in (0, 1)
    }
    assert [task for task, _, _ in order[:3]] == tasks
    # A second seed comes after its configuration's first.
    for task, number, seed in order:
        assert seed == 0 or order.index((task, number, 0)) < order.index((task, number, 1))


def test_an_unknown_task_is_named() -> None:
    assert design.chosen([]) == list(TASKS)
    with pytest.raises(UserError, match="no table of 'tiny/dates'"):
        design.chosen(["tiny/dates"])
