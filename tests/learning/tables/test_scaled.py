from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import ScaledRecord

PARAMETERS = {
    "learning_rate": 0.0123,
    "lora_rank": 8,
    "alpha_ratio": 2.0,
    "target_modules": "mlp",
    "batch_size": 4,
    "max_steps": 256,
    "lora_dropout": 0.05,
}
CONTEXT = {
    "hidden_size": 576,
    "model_layers": 30,
    "model_parameters": 134_515_008,
    "examples": 512,
    "mean_tokens": 71.5,
    "method": "sft",
    "precision": "bf16",
}


def record(task: str, split: str, number: int, final: float = 0.5) -> ScaledRecord:
    return ScaledRecord(
        task=task,
        split=split,
        configuration=number,
        parameters=PARAMETERS if number != UNTUNED else {},
        step=[64, 128, 192, 256],
        loss=[3.0, 2.0, 1.0, 0.5],
        accuracy=[0.5] * 4,
        quality=[0.1, 0.2, 0.3, final],
        cost=0.25,
        flops=1e13,
        context=CONTEXT,
    )


def test_compiled_records_read_back(tmp_path: Path) -> None:
    path = tmp_path / "scaled.parquet"
    given = [record("b", "test", 1), record("a", "train", UNTUNED), record("a", "train", 0)]
    scaled.write(path, given)
    back = scaled.read(path)
    assert [one.key for one in back] == sorted(one.key for one in given)
    by_key = {one.key: one for one in back}
    for one in given:
        same = by_key[one.key]
        assert (same.parameters, same.context, same.split) == (
            one.parameters,
            one.context,
            one.split,
        )
        assert (same.step, same.flops) == (one.step, one.flops)
        assert same.quality == pytest.approx(one.quality)
    again = tmp_path / "again.parquet"
    scaled.write(again, back)
    assert again.read_bytes() == path.read_bytes()


def test_tables_come_by_split_with_their_context(tmp_path: Path) -> None:
    path = tmp_path / "scaled.parquet"
    untuned = record("m/dates/512 examples/256 steps", "train", UNTUNED)
    runs = [record(untuned.task, "train", number, 0.1 * number) for number in (0, 3)]
    only_untuned = record("m/other/64 examples/8 steps", "train", UNTUNED)
    scaled.write(path, [untuned, *runs, only_untuned, record("x", "test", 0)])
    (table,) = scaled.load("train", path=path)
    assert (table.task.model, table.task.family, table.task.split) == ("m", "dates", "train")
    assert table.task.context == CONTEXT and table.untuned == 3.0
    assert table.configuration.tolist() == [0, 3]
    assert table.quality[:, -1] == pytest.approx([0.0, 0.3])
    assert set(table.parameters) == set(scaled.VARIED)
    assert [one.task.name for one in scaled.load(path=path)] == [table.task.name, "x"]
    assert scaled.load("validation", path=path) == []
    assert scaled.load(path=tmp_path / "none.parquet") == []


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        scaled.load("dev")


def test_what_was_measured_is_sound() -> None:
    tables = scaled.load()
    for table in tables:
        done = table.failure == ""
        assert np.isfinite(table.quality[done]).all() and (table.quality[done] <= 1).all()
        expected = 1 - table.loss[done, -1] / table.untuned
        np.testing.assert_allclose(table.quality[done, -1], expected, atol=1e-3)
        assert 0.2 < table.untuned < 12 and (table.cost > 0).all()
        known = table.task.context
        assert set(known) == set(scaled.CONTEXT)
        assert str(known["examples"]) in table.task.name
