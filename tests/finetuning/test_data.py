from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


def everything(splits: data.Splits) -> list[dict[str, Any]]:
    return [*splits.train, *splits.validation]


def test_whole_numbers_with_gaps_are_whole_again(tmp_path: Path) -> None:
    import pandas

    for name in ("gaps.parquet", "gaps.jsonl"):
        table = pandas.DataFrame(
            {"prompt": list("abcdef"), "completion": [1, 2, None, 0, None, 3]}
        )
        assert table["completion"].dtype == float
        if name.endswith("parquet"):
            table.to_parquet(tmp_path / name)
        else:
            table.to_json(tmp_path / name, orient="records", lines=True)
        splits = data.load(DataOptions(train=str(tmp_path / name)))
        answers = {row["prompt"]: row["completion"] for row in everything(splits)}
        assert answers == {"a": "1", "b": "2", "d": "0", "f": "3"} and splits.blank == 2


def test_the_word_nan_is_never_learnt(write_rows: Write) -> None:
    rows = [
        {"prompt": f"{n}?", "completion": float("nan") if n % 4 == 0 else n} for n in range(12)
    ]
    splits = data.load(DataOptions(train=write_rows(rows)))
    assert sorted(int(row["completion"]) for row in everything(splits)) == [
        n for n in range(12) if n % 4
    ]
    assert splits.blank == 3


def test_cells_of_csv_are_text_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('prompt,completion\na,1.0\nb,007\nc,nan\nd,\ne,"x, y"\n', encoding="utf-8")
    splits = data.load(DataOptions(train=str(path)))
    answers = {row["prompt"]: row["completion"] for row in everything(splits)}
    assert answers == {"a": "1.0", "b": "007", "c": "nan", "e": "x, y"} and splits.blank == 1


def test_a_cell_that_lost_its_quotes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\na,b\nc,d, and more\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3 has more cells than there are columns"):
        data.load(DataOptions(train=str(path)))


def test_a_head_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion,completion\na,b,c\n", encoding="utf-8")
    with pytest.raises(UserError, match="its head names 'completion' more than once"):
        data.load(DataOptions(train=str(path)))


def test_chats_in_csv_are_read(tmp_path: Path) -> None:
    import csv
    import json

    chats = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]
        for n in range(4)
    ]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(chat)] for chat in chats)])
    splits = data.load(DataOptions(train=str(tmp_path / "train.csv")))
    assert sorted(str(row["messages"]) for row in everything(splits)) == sorted(map(str, chats))


def test_every_turn_of_every_speaker_is_kept(write_rows: Write) -> None:
    names = [("human", "gpt"), ("user", "chatgpt"), ("human", "bing"), ("human", "bard")]
    rows = [
        {"conversations": [{"from": asks, "value": f"{n}?"}, {"from": says, "value": f"{n}!"}]}
        for n, (asks, says) in enumerate(names * 2)
    ]
    options = DataOptions(train=write_rows(rows), columns={"messages": "conversations"})
    found = sorted(everything(data.load(options)), key=str)
    assert [row["messages"] for row in found] == [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]
        for n in range(8)
    ]


def test_the_row_of_an_unknown_speaker_is_named(write_rows: Write) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": says, "value": "!"}]}
        for n, says in enumerate(["gpt", "gpt", "narrator"])
    ]
    options = DataOptions(train=write_rows(rows), columns={"messages": "conversations"})
    with pytest.raises(UserError) as refused:
        data.load(options)
    assert str(refused.value) == (
        "data.train: example 3 has a message in the column 'conversations' of 'narrator', which "
        "is no role; the roles are user, human, assistant, gpt, chatgpt, bot, chatbot, bard, "
        "bing, model, ai, tool, observation, system, developer, function, ipython, function_call"
    )


def test_a_system_column_opens_its_chats(write_rows: Write) -> None:
    rows = [
        {
            "sys": "Answer in capitals." if n else " ",
            "conversations": [
                {"from": "human", "value": f"hi {n}"},
                {"from": "gpt", "value": "YES"},
            ],
        }
        for n in range(3)
    ]
    columns = {"messages": "conversations", "system": "sys"}
    splits = data.load(DataOptions(train=write_rows(rows), columns=columns))
    system = {"role": "system", "content": "Answer in capitals."}
    for row in everything(splits):
        asked = row["messages"][-2]["content"]
        assert row["messages"][:-2] == ([] if asked == "hi 0" else [system])


def test_an_instruction_has_its_input_with_it_also_where_it_is_mapped(write_rows: Write) -> None:
    rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(3)]
    for columns in ({}, {"prompt": "instruction", "completion": "output"}):
        splits = data.load(DataOptions(train=write_rows(rows), columns=columns))
        assert sorted(row["prompt"] for row in everything(splits)) == [
            f"Add.\n{n}+1" for n in range(3)
        ]
    own = [{"q": "Add.", "about": f"{n}+1", "a": "1"} for n in range(3)]
    columns = {"prompt": "q", "input": "about", "completion": "a"}
    splits = data.load(DataOptions(train=write_rows(own), columns=columns))
    assert sorted(row["prompt"] for row in everything(splits))[0] == "Add.\n0+1"


def test_columns_that_no_example_holds_are_named(write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"{n}",
            "completion": "1",
            "tools": [{"name": "f"}],
            "source": "web",
            "none": "",
        }
        for n in range(3)
    ]
    assert data.load(DataOptions(train=write_rows(rows))).unread == ("tools", "source")


def test_a_look_reads_the_beginning_of_what_is_here(write_rows: Write) -> None:
    train = write_rows([{"prompt": f"{n}", "completion": "1", "id": n} for n in range(100)])
    with Path(train).open("a", encoding="utf-8") as file:
        file.write("no JSON\n")
    options = DataOptions(train=train, validation="some-org/on-the-hub")
    found = data.look(options)
    assert list(found) == ["data.train"]
    assert found["data.train"].kind == "prompt-completion"
    assert found["data.train"].unread == ("id",)
    assert found["data.train"].columns == {"prompt": "prompt", "completion": "completion"}
    later = write_rows([*[{"id": n} for n in range(80)], {"text": "a"}], "later.jsonl")
    assert data.look(DataOptions(train=later))["data.train"].kind == "text"
    with pytest.raises(UserError, match="has the columns 'id'; needed are"):
        data.look(DataOptions(train=write_rows([{"id": 1}], "none.jsonl")))
