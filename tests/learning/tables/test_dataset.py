from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import records
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import Record
from studies.tables.__main__ import main

CONFIGURATIONS = design.configurations(4)
TASK = "tiny/dates-small"


def made(number: int, seed: int = 0, final: float = 0.5, *, task: str = TASK) -> Record:
    return Record(
        task=task,
        configuration=number,
        seed=seed,
        parameters=CONFIGURATIONS[number],
        step=[2, 4, 6, 8],
        loss=[3.0, 2.5, 2.0, 1.5],
        accuracy=[0.1, 0.2, 0.3, 0.4],
        quality=[0.1, 0.2, 0.3, final],
        trainable_parameters=1000 + number,
        tokens=640,
        flops=1.25e9,
        bytes=5e7,
        cost=0.5,
        seconds=0.75,
    )


FAILED = Record(
    task=TASK,
    configuration=3,
    parameters=CONFIGURATIONS[3],
    step=[2],
    loss=[9.0],
    accuracy=[0.0],
    quality=[-2.0],
    failure="diverged",
    cost=2.0,
)
BASE = Record(
    task=TASK, configuration=UNTUNED, step=[0], loss=[3.25], accuracy=[0.0], quality=[0.0]
)


def test_a_log_survives_being_torn(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "tables.jsonl"
    assert records.read(log) == []
    records.append(log, BASE)
    records.append(log, made(0))
    whole = log.read_bytes()
    for cut in (1, 30, 200):
        log.write_bytes(whole[:-cut])
        assert records.read(log) == [BASE]
        records.append(log, made(1))
        assert made(1) in records.read(log) and BASE in records.read(log)


def test_compiled_records_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tables.parquet"
    given = [made(1), FAILED, BASE, made(0, 1, 0.25), made(0)]
    dataset.write(path, given)
    back = dataset.read(path)
    assert [one.key for one in back] == sorted(one.key for one in given)
    by_key = {one.key: one for one in back}
    for one in given:
        same = by_key[one.key]
        assert same.parameters == one.parameters
        assert (same.failure, same.step, same.flops) == (one.failure, one.step, one.flops)
        assert same.quality == pytest.approx(one.quality)
    again = tmp_path / "again.parquet"
    dataset.write(again, back)
    assert again.read_bytes() == path.read_bytes()


def test_tables_have_the_documented_shapes(tmp_path: Path) -> None:
    path = tmp_path / "tables.parquet"
    other = made(0, task="tiny/cipher-ample")
    dataset.write(path, [BASE, made(0), made(0, 1, 0.7), made(1), FAILED, other])
    train, test = dataset.load("train", path=path), dataset.load("test", path=path)
    assert [table.task.name for table in train + test] == [TASK, "tiny/cipher-ample"]
    assert dataset.load("validation", path=path) == []
    table = train[0]
    assert len(table) == 4 and table.untuned == 3.25
    assert table.configuration.tolist() == [0, 0, 1, 3] and table.seed.tolist() == [0, 1, 0, 0]
    assert table.failure.tolist() == ["", "", "", "diverged"]
    assert table.step[-1].tolist() == [2, 0, 0, 0]
    assert np.isnan(table.quality[-1, 1:]).all() and table.loss.shape == (4, 4)
    assert set(table.parameters) == set(design.SPACE)
    assert table.noise == pytest.approx(0.2 / math.sqrt(2))
    assert math.isnan(test[0].noise)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        dataset.load("dev")


def test_compiling_adds_to_what_is_there(tmp_path: Path) -> None:
    log, path = tmp_path / "tables.jsonl", tmp_path / "tables.parquet"
    assert main(["compile", "--log", str(log), "--compiled", str(path)]) == 1
    dataset.write(path, [BASE, made(0)])
    records.append(log, made(1))
    records.append(log, made(0, final=0.9))
    assert main(["compile", "--log", str(log), "--compiled", str(path)]) == 0
    back = dataset.read(path)
    assert [one.configuration for one in back] == [UNTUNED, 0, 1]
    assert back[1].quality[-1] == 0.5
