"""The tasks for real models: right answers, and splits that share nothing."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys

import pytest

from optuna_lora_rl import real
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.real import tasks

ALL = (*real.TASKS, "reasoning_gym:chain_sum")


def _asked(row: dict) -> str:
    return row["prompt"][0]["content"]


def _answer(row: dict) -> str:
    return row["completion"][0]["content"]


@pytest.mark.parametrize("task", ALL)
def test_no_question_stands_in_two_splits(task: str) -> None:
    splits = {split: real.load(task, split) for split in tasks.SIZES}
    assert len(splits["validation"]) == 128
    assert len(splits["test"]) == 256
    assert 1000 <= len(splits["train"]) <= 1024
    questions = [_asked(row) for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    # As a study reads them.
    assert sources.read(task, key="data.train", split="test") == splits["test"]
    assert sources.brings(task, "validation")


def test_no_person_date_amount_or_word_stands_in_two_splits() -> None:
    for task, subject in {
        "real:extraction": lambda row: json.loads(_answer(row))["name"],
        "real:dates": _answer,
        "real:numbers": _answer,
        "real:inflection": lambda row: re.search('"(.*)"', _asked(row))[1],
    }.items():
        seen = [subject(row) for split in tasks.SIZES for row in real.load(task, split)]
        assert len(set(seen)) == len(seen)


def test_a_record_is_what_its_text_says() -> None:
    for row in real.load("real:extraction", "validation"):
        record = json.loads(_answer(row))
        assert list(record) == ["name", "company", "city", "email", "date", "amount"]
        text = _asked(row)
        assert all(record[key] in text for key in ("name", "company", "city", "email"))
        assert f"{record['amount']:,.2f}" in text
        assert str(datetime.date.fromisoformat(record["date"]).year) in text


def test_amounts_keep_all_their_digits() -> None:
    for row in real.load("real:numbers", "validation"):
        written = _asked(row).rpartition(": ")[2]
        assert "".join(re.findall(r"\d", written)) == _answer(row).replace(".", "")


def test_half_of_the_words_take_more_than_an_ending() -> None:
    rows = [row for split in tasks.SIZES for row in real.load("real:inflection", split)]
    endings = ("s", "es", "d", "ed", "ing", "r", "er", "st", "est")
    simple = 0
    for row in rows:
        word = re.search('"(.*)"', _asked(row))[1]
        simple += _answer(row) in {word + ending for ending in endings}
    assert simple == len(rows) / 2


def test_the_same_in_another_process() -> None:
    code = "from optuna_lora_rl import real; print(hash(str(real.load('real:dates', 'test'))))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": "1"} | {"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("real:nothing", "there is no task 'real:nothing'; there are real:extraction"),
        ("reasoning_gym:nothing", "reasoning_gym has no generator 'nothing'"),
    ],
)
def test_an_unknown_task_is_one_sentence(task: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^data.train: {said}"):
        sources.read(task, key="data.train", split="train")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    tasks._pool.cache_clear()
    with pytest.raises(UserError, match=r"needs the package babel.*optuna_lora_rl\[real\]"):
        real.load("real:dates", "train")
