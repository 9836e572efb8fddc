"""The earlier studies that a study's file names in ``transfer_from``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study.storage import DATABASE
from optuna_lora_rl.study.storage import database_errors
from optuna_lora_rl.study.storage import open_storage
from optuna_lora_rl.study.storage import sqlite_file
from optuna_lora_rl.study.storage import sqlite_url
from optuna_lora_rl.study.storage import without_password

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec


def load_all(spec: StudySpec) -> list[optuna.Study]:
    """The studies of ``transfer_from``.

    Raises:
        UserError: A storage or study that is not there, several where one is meant, or the study
            itself.
    """
    return [_load(entry.study, entry.storage, spec) for entry in spec.earlier_studies()]


def load(name: str | None, url: str) -> optuna.Study:
    """One study of a storage; its only one where no name is given.

    Args:
        name: The study's name.
        url: The storage's SQLAlchemy URL, or the output folder of an earlier run.

    Raises:
        UserError: As in ``load_all``.
    """
    storage, where = _open(url)
    with database_errors(_url(url)[0]):
        names = optuna.get_all_study_names(storage)
        if name is None:
            if len(names) != 1:
                raise UserError(f"{where} holds {_listed(names)}; say which with its name")
            name = names[0]
        if name not in names:
            raise UserError(f"there is no study {name!r} in {where}; it holds {_listed(names)}")
        return optuna.load_study(study_name=name, storage=storage)


def load_several(url: str, names: Sequence[str]) -> list[optuna.Study]:
    """Studies of a storage by name, or all of it.

    Args:
        url: The storage's SQLAlchemy URL, or the output folder of an earlier run.
        names: The studies' names; none for all.

    Raises:
        UserError: A storage or study that is not there, or a storage without any.
    """
    if names:
        return [load(name, url) for name in names]
    storage, where = _open(url)
    with database_errors(_url(url)[0]):
        found = optuna.get_all_study_names(storage)
        if not found:
            raise UserError(f"{where} holds no study")
        return [optuna.load_study(study_name=name, storage=storage) for name in sorted(found)]


def _open(url: str) -> tuple[optuna.storages.BaseStorage, str]:
    """The storage, which has to be there, and how to call it in a sentence."""
    url, where = _url(url)
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        raise UserError(f"there is no database {file}")
    return open_storage(url), where


def _load(name: str | None, storage: str | None, spec: StudySpec) -> optuna.Study:
    storage = storage or spec.storage_url
    url = _url(storage)[0]
    try:
        study = load(name, storage)
    except UserError as error:
        raise UserError(f"transfer_from: {error}") from None
    if study.study_name == spec.name and _same(url, spec.storage_url):
        raise UserError(f"transfer_from: {spec.name!r} is this study itself; name earlier ones")
    return study


def _same(url: str, other: str) -> bool:
    files = sqlite_file(url), sqlite_file(other)
    if files[0] and files[1]:
        return files[0].resolve() == files[1].resolve()
    return url == other


def _url(storage: str) -> tuple[str, str]:
    """The URL of a storage or of a run's folder, and how to call it in a sentence."""
    if "://" not in storage:
        return sqlite_url(Path(storage) / DATABASE), storage
    return storage, without_password(storage)


def _listed(names: list[str]) -> str:
    return f"{len(names)} studies ({', '.join(sorted(names)[:10])})" if names else "no study"
