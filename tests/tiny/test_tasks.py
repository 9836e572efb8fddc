from __future__ import annotations

import subprocess
import sys

import pytest

from optuna_lora_rl import tiny
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.tiny import tasks


def prompts(task: str, split: str) -> set[str]:
    return {row.get("prompt", row.get("text", "")) for row in tiny.load(task, split)}


def test_every_family_comes_in_two_sizes() -> None:
    assert len(tiny.FAMILIES) >= 8
    assert len(tiny.TASKS) == 2 * len(tiny.FAMILIES)
    assert {f"{family}-{size}" for family in tiny.FAMILIES for size in ("small", "ample")} == set(
        tiny.TASKS
    )


@pytest.mark.parametrize("task", tiny.TASKS)
def test_splits_have_their_sizes_and_share_no_prompt(task: str) -> None:
    train, validation, test = (prompts(task, split) for split in tasks.SPLITS)
    assert len(train) == (96 if task.endswith("small") else 1024)
    assert len(validation) == 160
    assert len(test) == 256
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_sizes_are_judged_on_the_same_examples(family: str) -> None:
    for split in ("validation", "test"):
        assert tiny.load(f"{family}-small", split) == tiny.load(f"{family}-ample", split)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_rows_are_filled_in(task: str) -> None:
    keys = {"text"} if task.startswith("sources") else {"prompt", "completion"}
    for row in tiny.load(task, "validation"):
        assert set(row) == keys
        assert all(text.strip() for text in row.values())
        if "prompt" in row:
            assert row["completion"].startswith(" ")
            assert not row["prompt"].endswith(" ")


def test_another_process_loads_the_same_examples() -> None:
    code = (
        "import hashlib; from optuna_lora_rl import tiny;"
        "rows = [tiny.load(task, 'train') for task in tiny.TASKS];"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_a_changed_row_does_not_change_the_task() -> None:
    tiny.load("dates-small", "train")[0]["prompt"] = "spoilt"
    assert tiny.load("dates-small", "train")[0]["prompt"] != "spoilt"


def test_loading_tasks_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from optuna_lora_rl import tiny; tiny.load('docstrings-small', 'train');"
        "assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_task_is_named_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'date-small'.*dates-small"):
        tiny.load("date-small", "train")


def test_an_unknown_split_is_named_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'dev'.*validation"):
        tiny.load("dates-small", "dev")
