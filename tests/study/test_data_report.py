"""What is said of the data: when a study begins, in its status and in its report."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import summary
from optuna_lora_rl.study.display import LineDisplay
from optuna_lora_rl.study.spec import StudySpec

MakeSpec = Callable[..., StudySpec]
Write = Callable[..., str]


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(count)]


def facts(model: Path, objective: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    """What a fine-tuner says of the data."""
    tuner = FineTuner(
        ModelOptions(name=str(model)),
        DataOptions(**data),
        TrainingOptions(use_cpu=True),
        ObjectiveOptions(**(objective or {})),
    )
    return tuner.data_facts()


def shown(spec: StudySpec) -> str:
    """What is printed while a study runs."""
    console = Console(file=io.StringIO(), width=500)
    runner.run(spec, display=LineDisplay(console))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def filled(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def test_every_row_is_counted_once(random_llama: Path, write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [*sums(20), *sums(3)]
    rows += [{"prompt": "1=", "completion": text} for text in ("", " ", None)]
    rows += [{"prompt": "2=", "completion": "123456789"}, {"prompt": "1" * 20, "completion": "1"}]
    rows += [{"prompt": "</s>3=", "completion": "3"}]
    train = write_rows([*rows, *({**row, "id": 1} for row in sums(22)[20:])])
    validation = write_rows([*sums(2), {"prompt": "x", "completion": None}], "validation.jsonl")
    test = write_rows([{"prompt": "9=", "completion": "9"}, *sums(3)[2:]], "test.jsonl")
    found = facts(
        random_llama,
        train=train,
        validation=validation,
        test=test,
        max_length=10,
        max_train_samples=20,
    )
    assert found["unread"] == ["id"] and found["max_length"] == 10
    splits = found["splits"]
    # 0 and 1 stand twice in training and in validation; 2 twice in training and in the test.
    assert splits["train"]["overlapping"] == 6 and splits["train"]["blank"] == 3
    assert splits["train"]["undrawn"] == 2
    assert filled(splits["validation"]) == {"read": 3, "blank": 1, "used": 2}
    assert filled(splits["test"]) == {"read": 2, "used": 2}
    assert sum(splits["train"][name] for name in ("cut", "emptied", "special")) >= 1
    left_out = (
        "blank",
        "unanswered",
        "overlapping",
        "set_aside",
        "repeated",
        "undrawn",
        "emptied",
    )
    for counts in splits.values():
        assert counts["read"] == counts["used"] + sum(counts[name] for name in left_out)


def test_what_is_cut_emptied_and_special_is_counted(random_llama: Path, write_rows: Write) -> None:
    rows = [*sums(4), {"prompt": "2=", "completion": "123456789"}]
    rows += [{"prompt": "1" * 20, "completion": "1"}, {"prompt": "</s>3=", "completion": "3"}]
    rows += sums(1)
    validation = write_rows([{"prompt": "0", "completion": "1234567890"}], "validation.jsonl")
    found = facts(random_llama, train=write_rows(rows), validation=validation, max_length=10)
    assert filled(found["splits"]["train"]) == {
        "read": 8,
        "used": 7,
        "emptied": 1,
        "cut": 1,
        "special": 1,
        "duplicated": 1,
    }
    assert filled(found["splits"]["validation"]) == {"read": 1, "used": 1, "cut": 1}


def test_what_is_set_aside_is_counted(random_llama: Path, write_rows: Write) -> None:
    rows = [{"text": f"{n}"} for n in range(10)]
    found = facts(random_llama, train=write_rows(rows * 2), validation_fraction=0.2, max_length=9)
    assert found["learns"] == "every token"
    assert filled(found["splits"]["train"]) == {
        "read": 20,
        "set_aside": 4,
        "used": 16,
        "duplicated": 8,
    }
    assert filled(found["splits"]["validation"]) == {"read": 4, "repeated": 2, "used": 2}


def test_chats_without_an_answer_are_counted_and_what_is_learnt_said(
    random_llama: Path, write_rows: Write
) -> None:
    asked = [{"role": "user", "content": "?"}]
    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(3)]
    rows += [
        {"messages": [*row["messages"], {"role": "assistant", "content": "yes"}]} for row in rows
    ]
    validation = write_rows([{"messages": [*asked, *rows[-1]["messages"][1:]]}], "v.jsonl")
    found = facts(random_llama, train=write_rows(rows), validation=validation)
    assert found["learns"] == "every turn, the user's among them"
    assert filled(found["splits"]["train"]) == {"read": 6, "unanswered": 3, "used": 3}


def test_it_is_said_stored_and_reported(make_spec: MakeSpec, write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [{**row, "source": "web"} for row in sums(40)]
    rows += [{"prompt": "no", "completion": ""}] * 20
    spec = make_spec({"data": {"train": write_rows(rows)}, "budget": 1})
    line = (
        "data: train 36 of 60 rows (20 blank, 4 set aside for validation), validation 4 rows; "
        "prompts and completions, learnt in the completion; not read: 'source'"
    )
    printed = shown(spec)
    assert line in printed.splitlines()
    assert "validation reads only 4 examples: their mean is uncertain by 50% of what" in printed

    from optuna_lora_rl.study import opening

    study = opening.load_study(spec)
    assert filled(study.user_attrs["data"]["splits"]["train"]) == {
        "read": 60,
        "blank": 20,
        "set_aside": 4,
        "used": 36,
    }
    console = Console(file=io.StringIO(), width=500)
    summary.standing(console, study, spec)
    status = console.file.getvalue()  # type: ignore[attr-defined]
    assert line in status and "uncertain by 50%" in status
    report = (spec.folder / "report.html").read_text(encoding="utf-8")
    table = re.sub("<[^>]+>", " ", report.split("<h2>The data</h2>")[1].split("</table>")[0])
    assert " ".join(table.split()) == (
        "train validation rows read 60 4 left out: blank 20 0 left out: set aside for validation "
        "4 0 used 36 4"
    )
    assert "Columns that no example holds: &#x27;source&#x27;." in report
    assert "Validation reads only 4 examples" in report


@pytest.mark.parametrize(
    ("samples", "objective", "words"),
    [
        (1, {}, "validation reads one example: which configuration is best for it says nothing"),
        (29, {}, "validation reads only 29 examples: their mean is uncertain by 19% of what"),
        (30, {}, None),
        (30, {"metric": "exact_match", "generation_samples": 9}, "reads only 9 examples"),
    ],
)
def test_a_validation_set_that_tells_little_is_said(
    random_llama: Path,
    write_rows: Write,
    samples: int,
    objective: dict[str, Any],
    words: str | None,
) -> None:
    from optuna_lora_rl.study import data_report

    found = facts(
        random_llama,
        objective,
        train=write_rows(sums(90)),
        validation_fraction=0.5,
        max_validation_samples=samples,
    )
    said = data_report.warnings(json.loads(json.dumps(found)))
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_names_of_columns_are_text_in_the_report(random_llama: Path, write_rows: Write) -> None:
    from optuna_lora_rl.study import data_report

    rows = [{**row, "<b>": 1} for row in sums(90)]
    section = data_report.section(facts(random_llama, train=write_rows(rows)))
    assert "&lt;b&gt;" in section and "<b>" not in section
