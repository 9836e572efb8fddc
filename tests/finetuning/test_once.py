"""Measurements that are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.once import once

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
