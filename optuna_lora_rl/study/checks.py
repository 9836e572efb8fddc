"""What can be checked of a study before anything is loaded, written or trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning import model_files
from optuna_lora_rl.finetuning import process
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning import trackers
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import output
from optuna_lora_rl.study import problem
from optuna_lora_rl.study import reading
from optuna_lora_rl.study import storage

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec


def require(spec: StudySpec) -> None:
    """Check that model, data, machine, trackers, storage and output folder can be used.

    Nothing is created, and of the data only the first rows are read. What lies on the hub is
    not fetched.

    Raises:
        UserError: Naming every obstacle, one line each.
    """
    checks = (_model, _data, _machine, _trackers, _output, _study, opening.load_earlier)
    found: list[str] = []
    for check in checks:
        try:
            check(spec)
        except UserError as error:
            found.append(str(error))
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError(reading.listed(f"{len(found)} things stand in the way:", found))


def notes(spec: StudySpec) -> Iterator[str]:
    """Say how the data is read, and what could not be checked here."""
    for key, form in data.look(spec.data).items():
        columns = ", ".join(
            role if role == column else f"{role} from {column}"
            for role, column in form.columns.items()
        )
        unread = f"; not read: {', '.join(form.unread)}" if form.unread else ""
        yield f"{key}: {form.kind} ({columns}){unread}"
    hub = [name for name in (spec.data.train, spec.data.validation, spec.data.test) if name]
    unseen = [name for name in hub if sources.is_hub(name)]
    if model_files.is_hub(spec.model):
        unseen.insert(0, spec.model.name)
    for name in unseen:
        yield not_checked(name)


def not_checked(name: str) -> str:
    """Say that a model or data set is not here yet."""
    return f"not checked: {name} is no local file or folder, and run fetches it from the hub"


def _model(spec: StudySpec) -> None:
    from huggingface_hub import constants

    model_files.check(spec.model)
    if constants.HF_HUB_OFFLINE and model_files.is_hub(spec.model):
        raise UserError(
            f"model.name: {spec.model.name!r} is no local folder and not in the hub's cache here, "
            "and HF_HUB_OFFLINE forbids to fetch it"
        )


def _data(spec: StudySpec) -> None:
    for name in ("train", "validation", "test"):
        source = getattr(spec.data, name)
        if source and sources.is_hub(source):
            model_files.check_hub_name(source, f"data.{name}", "data set")
    forms = data.look(spec.data)
    train = forms.get("data.train")
    if train is not None:
        data.check_metric(train.kind, spec.objective)


def _machine(spec: StudySpec) -> None:
    # It takes torch, which takes a second.
    from optuna_lora_rl.finetuning import device

    process.check()
    refused = device.obstacle(spec.model, spec.training)
    if refused:
        raise UserError(refused)


def _trackers(spec: StudySpec) -> None:
    found = trackers.obstacles(spec.training.report_to)
    if found:
        raise UserError("; ".join(found))


def _output(spec: StudySpec) -> None:
    _check_usable(spec.folder, "output")
    output.check(spec.folder, spec.name, storage.sqlite_file(spec.storage_url))


def _check_usable(folder: Path, key: str) -> None:
    """Check that a folder is one, or can be made, and takes files."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{key}: the folder {str(folder)!r} cannot be made, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: the folder {str(there)!r} cannot be written by this user")


def _study(spec: StudySpec) -> None:
    """Check that the storage can be reached, and that a study of this name is the same one."""
    with storage.read(spec.storage_url):
        study = _begun(spec)
        if study is not None and study.get_trials(deepcopy=False):
            opening.check_objectives(len(study.directions), spec)
            problem.check(study, spec)
        opening.check_known(study, spec)


def _begun(spec: StudySpec) -> optuna.Study | None:
    """Return the study as it stands, or None where it has not begun; creates nothing."""
    file = storage.sqlite_file(spec.storage_url)
    if file is not None and not file.exists():
        if spec.storage is not None:
            _check_usable(file.parent, "storage")
        return None
    if not storage.has_tables(spec.storage_url):
        return None
    found = storage.open_storage(spec.storage_url)
    if spec.name not in optuna.get_all_study_names(found):
        return None
    return optuna.load_study(study_name=spec.name, storage=found)
