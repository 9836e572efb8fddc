from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import cache as kept_module
from optuna_lora_rl.finetuning.cache import kept
from optuna_lora_rl.finetuning.cache import once


def small() -> dict[str, Dataset]:
    return {"train": Dataset.from_dict({"input_ids": [[n, n] for n in range(3)]})}


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "gone", "no sums", "[]", "{}", "3", "null", "[" * 100_000, "{"]
)
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    kept(tmp_path, {"a": 1}, small)
    (arrow,) = tmp_path.rglob("*.arrow")
    content = arrow.read_bytes()
    match damage:
        case "cut":
            arrow.write_bytes(content[: len(content) // 2])
        case "changed":
            arrow.write_bytes(content[:-300] + b"\x07" + content[-299:])
        case "gone":
            arrow.unlink()
        case "no sums":
            (arrow.parents[1] / "sums.json").unlink()
        case sums:
            (arrow.parents[1] / "sums.json").write_text(sums)
    for times in (1, 0):
        calls: list[int] = []

        def counted(calls: list[int] = calls) -> dict[str, Dataset]:
            calls.append(1)
            return small()

        assert kept(tmp_path, {"a": 1}, counted)["train"].to_dict() == small()["train"].to_dict()
        assert len(calls) == times


def test_of_two_processes_at_once_the_first_entry_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten() -> dict[str, Dataset]:
        kept(tmp_path, {}, small)
        return small()

    assert kept(tmp_path, {}, beaten)["train"].to_dict() == small()["train"].to_dict()
    (entry,) = tmp_path.iterdir()
    # By a hair: the other's entry comes between the look and the renaming.
    looks = iter([False, False])
    monkeypatch.setattr(kept_module, "_intact", lambda path: next(looks))
    monkeypatch.setattr(kept_module.shutil, "rmtree", spared(entry))
    assert kept(tmp_path, {}, small)["train"].to_dict() == small()["train"].to_dict()
    assert next(looks, None) is None
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [entry]
    assert kept_module._intact(entry)


def spared(entry: Path) -> Callable[..., None]:
    own = shutil.rmtree
    return lambda path, **how: None if path == entry else own(path, **how)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache folder '.*tokens' cannot be written: Not a"):
        kept(tmp_path / "file" / "tokens", {}, small)


VALUES = {"loss": 1.25, "names": ["a"], "nothing": None}


def measured(folder: Path) -> tuple[dict[str, object], int]:
    calls: list[int] = []

    def measure() -> dict[str, object]:
        calls.append(1)
        return dict(VALUES)

    return once(folder, "things", {"a": 1}, measure), len(calls)


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    assert [measured(tmp_path) for _ in range(3)] == [(VALUES, 1), (VALUES, 0), (VALUES, 0)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        json.dumps(VALUES).encode(),
        json.dumps({"values": {"loss": "low"}, "sum": "0"}).encode(),
        json.dumps({"values": [], "sum": None}).encode(),
    ],
)
def test_what_is_not_as_it_was_written_is_measured_again(tmp_path: Path, content: bytes) -> None:
    measured(tmp_path)
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(content)
    assert [measured(tmp_path) for _ in range(2)] == [(VALUES, 1), (VALUES, 0)]


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    measured(tmp_path)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace("1.25", "9.25"))
    assert measured(tmp_path) == (VALUES, 1)


def test_a_folder_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    measured(tmp_path)
    (file,) = tmp_path.rglob("*.json")
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"the cache folder '.*things' cannot be written: Is a di"):
        measured(tmp_path)
