"""Every shape of data in docs/data.md, and what the page says becomes of it."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning.options import DataOptions

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d, e"}]
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: sets/a.jsonl}
  - {split: test, path: sets/b.jsonl}
---
"""


def table(heading: str) -> list[tuple[str, str]]:
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [(cells[0], cells[1]) for line in lines if (cells := line.strip("| ").split(" | "))]


SHAPES = table("Rows")
PLACES = table("Files and folders")


def test_the_page_has_its_tables() -> None:
    assert len(SHAPES) >= 45 and len(PLACES) >= 14


@pytest.mark.parametrize(("row", "becomes"), SHAPES, ids=[row for row, _ in SHAPES])
def test_a_row_becomes_what_the_page_says(tmp_path: Path, row: str, becomes: str) -> None:
    file = tmp_path / "train.jsonl"
    texts = [row.strip("`").replace("Hi", f"Hi{n}") for n in range(4)]
    file.write_text("\n".join(texts), encoding="utf-8")
    options = DataOptions(train=str(file))
    if becomes.startswith("`"):
        splits = data.load(options)
        found = [json.dumps(example) for example in [*splits.train, *splits.validation]]
        assert sorted(found) == sorted(
            json.dumps(json.loads(becomes.strip("`").replace("Hi", f"Hi{n}"))) for n in range(4)
        )
        return
    kind, _, words = becomes.partition(": ")
    with pytest.raises(UserError) as refused:
        data.load(options)
    told = re.sub("Hi[0-3]", "Hi", str(refused.value))
    expected = words if kind == "refused" else f"(4 read, 4 {words})"
    assert expected in told and "\n" not in told
    if kind == "refused" and "the columns" not in words and "pairs" not in words:
        assert told.startswith("data.train: example 1 ")


@pytest.mark.parametrize(("place", "what"), PLACES, ids=[place for place, _ in PLACES])
def test_a_place_is_read_as_the_page_says(tmp_path: Path, place: str, what: str) -> None:
    names = place.strip("`").split(", ")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if "dataset_dict" not in place:
            (tmp_path / name).write_bytes(written(name, ROWS))
    if "dataset_dict" in place:
        from datasets import Dataset
        from datasets import DatasetDict

        split = Dataset.from_list(ROWS)
        DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path)
    train = str(tmp_path / names[0] if len(names) == 1 else tmp_path)
    validation = tmp_path / "another.csv"
    validation.write_text("prompt,completion\nx,y\n", encoding="utf-8")
    options = DataOptions(train=train, validation=str(validation))
    if what.startswith("refused"):
        with pytest.raises(UserError, match=what.partition(": ")[2]):
            data.load(options)
        return
    if len(names) == 1:
        assert data.load(options).train == ROWS
        return
    validation.unlink()
    own = DataOptions(train=train, split="test", validation_fraction=0.5)
    splits = data.load(own)
    assert sorted(map(str, [*splits.train, *splits.validation])) == sorted(map(str, ROWS))


def written(name: str, rows: list[dict[str, Any]]) -> bytes:
    """The content of a file of that name."""
    if name == "README.md":
        return CARD.encode()
    *_, stem = Path(name).suffixes
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda plain: pyarrow.compress(plain, codec="zstd", asbytes=True),
    }
    if stem in packers:
        return packers[stem](written(name.removesuffix(stem), rows))
    if stem == ".parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue())
    if stem in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[stem]
        lines = [[f'"{cell}"' for cell in row.values()] for row in rows]
        return "\n".join(map(separator.join, [["prompt", "completion"], *lines])).encode()
    text = json.dumps(rows) if stem == ".json" else "\n".join(map(json.dumps, rows))
    return text.encode()


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a{[\"' ", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
messages = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "function_call", "weight"]),
    st.sampled_from(["user", "gpt", "function_call", "system", "narrator"]) | cells,
    max_size=4,
)
columns = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "text",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
        "label",
        "weight",
        "images",
        "id",
    ]
)
some_rows = st.dictionaries(columns, st.lists(messages, max_size=3) | cells, max_size=4)


@settings(max_examples=400, deadline=None)
@given(kinds=st.lists(some_rows, min_size=1, max_size=4), copies=st.integers(1, 3))
def test_any_rows_are_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[dict[str, Any]], copies: int
) -> None:
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, kinds * copies)), encoding="utf-8")
    options = DataOptions(train=str(file))
    try:
        splits = data.load(options)
    except UserError as refused:
        assert "\n" not in str(refused) and str(refused).startswith("data.")
        return
    for row in [*splits.train, *splits.validation]:
        for turn in data.turns(row):
            assert isinstance(turn["role"], str) and isinstance(turn["content"], str)
    for counts in splits.counts.values():
        left_out = counts.blank + counts.unanswered + counts.overlapping + counts.undrawn
        assert counts.read == counts.used + left_out + counts.set_aside + counts.repeated
