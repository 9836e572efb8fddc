from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import sources

ROWS = [{"prompt": "a", "completion": "ä"}, {"prompt": "b", "completion": 'c, "d"\ne'}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert sources.read(str(path), key="data.train", split="train") == ROWS


def test_json_that_holds_one_object_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert sources.read(str(path), key="data.train", split="train") == ROWS


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    write(tmp_path / "test.csv", ROWS[:1])
    assert sources.read(str(tmp_path), key="data.train", split="train") == ROWS
    assert sources.read(str(tmp_path), key="data.test", split="test") == ROWS[:1]


def test_a_folder_of_one_file_is_its_training_split(tmp_path: Path) -> None:
    write(tmp_path / "anything.parquet", ROWS)
    write(tmp_path / "test.parquet", ROWS[:1])
    assert sources.read(str(tmp_path), key="data.train", split="train") == ROWS


def test_a_clone_from_the_hub_keeps_its_files_in_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text('{"default": {"x": 1}}')
    write(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    assert sources.read(str(tmp_path), key="data.train", split="train") == ROWS
    assert sources.read(str(tmp_path), key="data.test", split="test") == ROWS[:1]
    assert sources.brings(str(tmp_path), "test")
    assert not sources.brings(str(tmp_path), "validation")


def test_a_clone_keeps_its_subsets_apart(tmp_path: Path) -> None:
    for name, rows in (("main", ROWS[:1]), ("other", ROWS[1:])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
    found = sources.read(str(tmp_path), key="data.train", split="train", subset="other")
    assert found == ROWS[1:]


def test_every_shard_is_read(tmp_path: Path) -> None:
    for name in ("train", "train-2", "train_3", "trainers"):
        write(tmp_path / f"{name}.jsonl", [{"text": name}])
    found = sources.read(str(tmp_path), key="data.train", split="train")
    assert [row["text"] for row in found] == ["train-2", "train", "train_3"]


@pytest.mark.parametrize("name", ["val", "valid-1", "dev", "eval", "validation_2", "test"])
def test_files_of_other_splits_are_not_trained_on(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"{name}.jsonl", ROWS[:1])
    write(tmp_path / "development.jsonl", ROWS[1:])
    (tmp_path / "dataset_info.json").write_text('{"x": 1}')
    assert sources.read(str(tmp_path), key="data.train", split="train") == ROWS[1:]
    split = "test" if name == "test" else "validation"
    assert sources.read(str(tmp_path), key=f"data.{split}", split=split) == ROWS[:1]


def test_a_saved_dataset_gives_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets import DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved")
    assert sources.read(source, key="data.train", split="train") == ROWS
    with pytest.raises(UserError, match="no split 'dev'; it has train"):
        sources.read(source, key="data.train", split="dev")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: there is no file '.*gone\.csv'"):
        sources.read(str(tmp_path / "gone.csv"), key="data.train", split="train")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        sources.read(str(tmp_path / "gone"), key="data.train", split="train")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", '"text"\n', "line 1 is no JSON object"),
        ("a.json", '["x", "y"]', "no list of objects"),
        ("a.json", "", "no JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.csv", "prompt,completion\n", "has no example"),
        ("a.jsonl", "", "has no example"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as refused:
        sources.read(str(path), key="data.train", split="train")
    assert "\n" not in str(refused.value)


def test_text_that_is_no_utf8_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read"):
        sources.read(str(path), key="data.train", split="train")


def test_a_folder_without_data_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file ending in \.jsonl"):
        sources.read(str(tmp_path), key="data.train", split="train")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"no data")
    (tmp_path / "notes.txt").write_text("no data either", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no file ending in \.jsonl"):
        sources.read(str(tmp_path), key="data.train", split="train")
    write(tmp_path / "train.csv", ROWS)
    with pytest.raises(UserError, match=r"no file for the split 'test', only train\.csv"):
        sources.read(str(tmp_path), key="data.test", split="test")


def test_a_hub_name_is_loaded_with_its_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": f"{name} {subset} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = sources.read("org/set", key="data.train", split="train[:1]", subset="main")
    assert rows == [{"text": "org/set main train[:1]"}]


def test_a_hub_name_without_network_is_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot be fetched from the hub") as refused:
        sources.read("some-org/some-data", key="data.train", split="train")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("data.train: 'some-org/some-data'")


def test_rows_that_are_wanted_are_all_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    path.write_text(path.read_text() + "\nno JSON", encoding="utf-8")
    assert sources.read(str(path), key="data.train", split="train", limit=2) == ROWS
    with pytest.raises(UserError, match="line 3 is no JSON"):
        sources.read(str(path), key="data.train", split="train")


def test_a_file_cut_short_in_its_compression_is_one_sentence(tmp_path: Path) -> None:
    import gzip

    whole = gzip.compress(b"\n".join(b'{"text": "%d"}' % n for n in range(9999)))
    (tmp_path / "data.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data\.train: '.*data\.jsonl\.gz' cannot be read: "):
        sources.read(str(tmp_path / "data.jsonl.gz"), key="data.train", split="train")


def test_a_card_that_names_no_such_split_or_subset_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: a.jsonl\n---\n", encoding="utf-8"
    )
    write(tmp_path / "a.jsonl", ROWS)
    source = str(tmp_path)
    assert sources.read(source, key="data.train", split="train", subset="main") == ROWS
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        sources.read(source, key="data.test", split="test", subset="main")
    with pytest.raises(UserError, match="'other' not found"):
        sources.read(source, key="data.train", split="train", subset="other")


def test_names_in_capitals_are_read_too(tmp_path: Path) -> None:
    import gzip

    lines = "\n".join(map(json.dumps, ROWS)).encode()
    (tmp_path / "DATA.JSONL.GZ").write_bytes(gzip.compress(lines))
    found = sources.read(str(tmp_path / "DATA.JSONL.GZ"), key="data.train", split="train")
    assert found == ROWS


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the Hugging Face Hub"), "no connection"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "no connection"),
        (OSError("401 Client Error. Access to model x is restricted: gated repo"), "is gated"),
        (OSError("x is not a valid model identifier"), "neither here nor on the hub"),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "Unknown split"),
    ],
)
def test_hub_failures_say_what_is_wrong(error: Exception, words: str) -> None:
    assert words in sources.failure("model", "a/b", error)


def test_without_network_the_libraries_go_offline_for_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from huggingface_hub import constants

    def refuse(*args: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with sources.no_waiting():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_behind_a_proxy_the_libraries_try_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    with sources.no_waiting():
        assert not constants.HF_HUB_OFFLINE
