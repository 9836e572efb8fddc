from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning.options import DataOptions

Write = Callable[..., str]

texts = st.text("ab \n", min_size=1, max_size=4).filter(str.strip)
rows = st.lists(
    st.fixed_dictionaries({"prompt": texts, "completion": texts}), min_size=2, max_size=40
)


def contents(found: list[dict[str, Any]]) -> set[str]:
    return {data.content(row) for row in found}


@given(rows=rows, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_set_aside_never_overlaps_and_loses_nothing(
    rows: list[dict[str, Any]], fraction: float, seed: int
) -> None:
    distinct = len(contents(rows))
    if distinct < 2:
        with pytest.raises(UserError, match="at least 2"):
            data.set_aside(rows, fraction, seed)
        return
    validation, train = data.set_aside(rows, fraction, seed)
    assert validation and train
    assert not contents(validation) & contents(train)
    assert contents(validation) | contents(train) == contents(rows)
    assert len(contents(validation)) == len(validation)
    assert [row for row in rows if data.content(row) in contents(train)] == train
    assert data.set_aside(rows, fraction, seed) == (validation, train)


@given(rows=rows, seed=st.integers(0, 100), count=st.integers(1, 50))
def test_draw_keeps_order_and_is_the_same_for_the_same_seed(
    rows: list[dict[str, Any]], seed: int, count: int
) -> None:
    drawn = data.draw(rows, count, seed)
    assert len(drawn) == min(count, len(rows))
    assert drawn == data.draw(rows, count, seed)
    remaining = iter(rows)
    assert all(any(row is other for other in remaining) for row in drawn)


@given(rows=rows, seed=st.integers(0, 100))
def test_an_example_keeps_its_side_when_the_order_changes(
    rows: list[dict[str, Any]], seed: int
) -> None:
    if len(contents(rows)) >= 2:
        there, _ = data.set_aside(rows, 0.3, seed)
        back, _ = data.set_aside(rows[::-1], 0.3, seed)
        assert contents(there) == contents(back)


@settings(max_examples=25, deadline=None)
@given(train=rows, validation=rows, test=rows)
def test_given_splits_are_freed_of_each_others_content(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    test: list[dict[str, Any]],
) -> None:
    import json

    folder = tmp_path_factory.mktemp("splits")
    paths = {}
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        paths[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, split)))
    try:
        splits = data.load(DataOptions(**paths))
    except UserError as error:
        assert "leaves no example" in str(error)
        return
    assert splits.test is not None
    assert not contents(splits.train) & contents(splits.validation)
    assert not contents(splits.train) & contents(splits.test)
    assert not contents(splits.validation) & contents(splits.test)
    assert len(splits.test) == len(test)


def test_spacing_makes_no_new_example() -> None:
    assert data.content({"text": "a  b\n"}) == data.content({"text": "a b"})
    loose, tight = ([{"role": "user", "content": text}] for text in ("a  b\n", "a b"))
    assert data.content({"messages": loose}) == data.content({"messages": tight})
    assert data.content({"prompt": loose, "completion": tight}) == data.content(
        {"prompt": tight, "completion": [{"content": "a b", "role": "user"}]}
    )
    assert data.content({"prompt": "a b", "completion": "c"}) != data.content(
        {"prompt": "a", "completion": "b c"}
    )


def test_a_folder_brings_its_own_splits(write_rows: Write) -> None:
    import pathlib

    for name in ("train", "val", "test"):
        source = write_rows([{"text": f"{name} {i}"} for i in range(9)], f"{name}.jsonl")
    folder = str(pathlib.Path(source).parent)
    splits = data.load(DataOptions(train=folder))
    assert splits.test is not None
    for rows, name in ((splits.train, "train"), (splits.validation, "val"), (splits.test, "test")):
        assert [row["text"] for row in rows] == [f"{name} {i}" for i in range(9)]
    only = data.load(DataOptions(train=folder, split="test"))
    assert only.test is None and len(only.train) == 9


def test_columns_are_found_and_mapped(write_rows: Write) -> None:
    source = write_rows([{"q": f"{i}?", "a": i, "text": f"no {i}"} for i in range(20)])
    options = DataOptions(train=source, columns={"prompt": "q", "completion": "a"})
    splits = data.load(options)
    assert splits.kind == "prompt-completion"
    assert {"prompt": "3?", "completion": "3"} in splits.train + splits.validation
    assert data.load(DataOptions(train=source)).kind == "text"


def test_chat_is_read_in_both_spellings(write_rows: Write) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "yes"}]}
        for i in range(5)
    ]
    splits = data.load(DataOptions(train=write_rows(rows), columns={"messages": "conversations"}))
    assert splits.kind == "messages"
    turns = splits.train[0]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[1]["content"] == "yes"


def test_columns_are_those_of_all_rows(write_rows: Write) -> None:
    pairs: list[dict[str, Any]] = [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)]
    splits = data.load(DataOptions(train=write_rows([{"prompt": "x"}, *pairs])))
    assert splits.kind == "prompt-completion" and splits.blank == 1
    empty: list[dict[str, Any]] = [{"messages": None, "text": f"line {i}"} for i in range(8)]
    assert data.load(DataOptions(train=write_rows(empty))).kind == "text"


def test_a_message_that_only_calls_tools_says_nothing(write_rows: Write) -> None:
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": None, "tool_calls": call},
            ]
        }
        for i in range(5)
    ]
    splits = data.load(DataOptions(train=write_rows(rows)))
    answer = {"role": "assistant", "content": "", "tool_calls": call}
    assert [row["messages"][1] for row in splits.train] == [answer] * len(splits.train)


@pytest.mark.parametrize("mixed", ["completion", "example"])
def test_mixed_forms_are_refused(write_rows: Write, mixed: str) -> None:
    asked, said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows: list[dict[str, Any]] = [{"prompt": asked, "completion": said}]
    if mixed == "example":
        rows.append({"prompt": "a", "completion": "b"})
    else:
        rows.append({"prompt": asked, "completion": "b"})
    with pytest.raises(UserError, match="example 1 has messages and example 2 has text"):
        data.load(DataOptions(train=write_rows(rows)))
    if mixed == "completion":
        with pytest.raises(UserError, match="example 1 has messages and text; all prompts"):
            data.load(DataOptions(train=write_rows(rows[1:])))


def test_tools_go_with_their_chat(write_rows: Write) -> None:
    def chat(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "b"}]

    rows = [{"messages": chat(i), "tools": [{"name": "look"}]} for i in range(4)]
    splits = data.load(DataOptions(train=write_rows([*rows, {"messages": chat(4)}])))
    tools = {row["messages"][0]["content"]: row["tools"] for row in splits.train}
    assert set(tools.values()) == {'[{"name": "look"}]', None}


def test_rows_without_text_are_left_out_and_counted(write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [{"text": f"line {i}"} for i in range(9)]
    splits = data.load(DataOptions(train=write_rows([*rows, {"text": " "}, {"text": None}])))
    assert splits.blank == 2
    assert len(splits.train) + len(splits.validation) == 9


def test_chats_whose_answers_are_empty_are_left_out(write_rows: Write) -> None:
    def chat(number: int, answer: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": answer},
        ]

    rows = [{"messages": chat(i, "yes" if i < 6 else " ")} for i in range(9)]
    splits = data.load(DataOptions(train=write_rows(rows)))
    assert splits.blank == 3 and len(splits.train) + len(splits.validation) == 6
    pairs = [{"prompt": chat(i, "")[:1], "completion": chat(i, "")[1:]} for i in range(9)]
    with pytest.raises(UserError, match="too few distinct examples, 0;"):
        data.load(DataOptions(train=write_rows(pairs)))


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"a": 1, "b": 2}], {}, "has the columns 'a', 'b'; needed are 'text'"),
        ([{"prompt": "x"}], {}, "has the columns 'prompt'"),
        ([{"text": "x"}], {"columns": {"text": "body"}}, "no column 'body'; it has 'text'"),
        ([{"text": "x"}, {"text": "x "}], {}, "too few distinct examples, 1;"),
        ([{"text": ["x"]}], {}, "example 1 has list in the column 'text'"),
        ([{"messages": [{"content": "x"}]}], {}, "without 'role'"),
        ([{"text": ""}, {"text": None}], {}, "too few distinct examples, 0;"),
        ([{"text": "x"}, {"text": "\ud800"}], {}, "example 2 has half of a surrogate pair"),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], {}, "example 1 has half of"),
        ([{"messages": []}], {}, "too few distinct examples, 0;"),
        ([{"text": "x"}], {"split": "dev"}, "one file and has no split 'dev'"),
    ],
)
def test_unusable_data_is_one_sentence(
    write_rows: Write, rows: list[dict[str, Any]], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        data.load(DataOptions(train=write_rows(rows), **options))
    assert words in str(refused.value)
    assert str(refused.value).startswith("data.")


def test_validation_of_another_kind_is_refused(write_rows: Write) -> None:
    train = write_rows([{"prompt": "1", "completion": "2"}] * 3)
    validation = write_rows([{"text": "1"}], "validation.jsonl")
    with pytest.raises(UserError, match="holds text examples, but"):
        data.load(DataOptions(train=train, validation=validation))


def test_training_data_that_all_stands_in_validation_is_refused(write_rows: Write) -> None:
    source = write_rows([{"text": "1"}, {"text": "2"}])
    with pytest.raises(UserError, match="leaves no example for training, after 2"):
        data.load(
            DataOptions(
                train=source, validation=write_rows([{"text": "1"}, {"text": "2"}], "v.jsonl")
            )
        )


def test_built_in_tasks_bring_their_own_splits() -> None:
    from optuna_lora_rl import tiny

    task = sorted(tiny.TASKS)[0]
    splits = data.load(DataOptions(train=f"tiny:{task}"))
    assert splits.train and splits.validation and splits.test
    with pytest.raises(UserError):
        data.load(DataOptions(train="tiny:no-such-task"))
