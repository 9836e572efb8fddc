"""Databases that cannot be used, and what is said of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import storage


def test_the_folder_of_a_new_database_is_created(tmp_path: Path) -> None:
    storage.open_storage(f"sqlite:///{tmp_path / 'a' / 'b' / 'study.db'}")
    assert (tmp_path / "a" / "b" / "study.db").exists()


@pytest.mark.parametrize(
    "url", ["postgresql://user:hunter2@127.0.0.1:1/name", "mysql://user:hunter2@nowhere/name"]
)
def test_a_password_is_never_shown(url: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.open_storage(url)
    assert "hunter2" not in str(caught.value) and "***" in str(caught.value)


def test_a_locked_database_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SQLITE_TIMEOUT", 0.1)
    file = tmp_path / "study.db"
    url = f"sqlite:///{file}"
    opened = storage.open_storage(url)
    lock = sqlite3.connect(file)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="is locked by another program"):
        with storage.database_errors(url):
            opened.create_new_study([])
    lock.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database at all, but long enough to look")
    with pytest.raises(UserError, match=r"study\.db is no SQLite database"):
        storage.open_storage(f"sqlite:///{tmp_path / 'study.db'}")


def test_a_read_only_file_system_is_one_sentence() -> None:
    # /proc takes no new folders, not even from root.
    with pytest.raises(UserError, match="the folder /proc/none cannot be created"):
        storage.open_storage("sqlite:////proc/none/study.db")


def test_the_disk_is_found_behind_other_errors() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("training failed") from error
    except RuntimeError as error:
        assert isinstance(storage.fatal_cause(error), OSError)
    assert storage.fatal_cause(RuntimeError("a bug")) is None


def test_a_bug_is_not_blamed_on_the_database() -> None:
    for bug in (ImportError("cannot import name 'x'"), RuntimeError("no kernel"), KeyError("x")):
        with pytest.raises(type(bug)), storage.database_errors("sqlite:///study.db"):
            raise bug
