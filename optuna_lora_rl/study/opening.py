"""Opens a study: its storage, its sampler, its pruner, and the check that it is the same one."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.study import StudyDirection

from optuna_lora_rl import pruners
from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.samplers.cut_short import cut_short
from optuna_lora_rl.samplers.cut_short import turn_of
from optuna_lora_rl.study import attributes
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import problem
from optuna_lora_rl.study import rows
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.storage import DATABASE
from optuna_lora_rl.study.storage import database_errors
from optuna_lora_rl.study.storage import open_storage
from optuna_lora_rl.study.storage import read
from optuna_lora_rl.study.storage import sqlite_file
from optuna_lora_rl.study.storage import sqlite_url
from optuna_lora_rl.study.storage import without_password

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec
    from optuna_lora_rl.vocabulary import Configuration


# Optuna's samplers whose random numbers would start again from the seed with every process.
_FORGETFUL = {"tpe", "gp", "random", "nsgaii"}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Optuna, whose news the display tells."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    # Telemetry of the hub would be a connection that nobody asked for.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # study/heartbeat.py gives the signs of life that Study.optimize would give.
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
            # What libraries deprecate among themselves is not for the user to mend.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def claim(spec: StudySpec) -> None:
    """Makes the output folder the study's, or checks that it is; see ``output.claim``."""
    output.claim(spec.folder, spec.name, sqlite_file(spec.storage_url))


def open_study(spec: StudySpec, *, heartbeat: bool = True) -> optuna.Study:
    """The study of the file, created where there is none.

    Args:
        spec: The study.
        heartbeat: Whether running trials show that they are alive; not for ask and tell.

    Raises:
        UserError: If the storage fails, or holds a study of another problem under this name, or
            the output folder is not the study's.
    """
    claim(spec)
    storage = open_storage(spec.storage_url, heartbeat=heartbeat)
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: spec.n_objectives]
    with read(spec.storage_url):
        _forget_if_empty(storage, spec, len(directions))
        with output.lock(spec.folder):
            _mend_numbers(storage, spec)
    sampler = create_sampler(spec, source_studies=load_earlier(spec))
    with read(spec.storage_url):
        study = optuna.create_study(
            study_name=spec.name,
            storage=storage,
            directions=directions,
            load_if_exists=True,
            sampler=sampler,
            pruner=create_pruner(spec),
        )
    _read_whole(study, spec)
    problem.adopt(study, spec)
    check_known(study, spec)
    study.set_metric_names(list(spec.objective.objectives))
    return study


def load_study(spec: StudySpec) -> optuna.Study:
    """The study of the file as it stands, to look at.

    Raises:
        UserError: If it has not begun.
    """
    missing = UserError(
        f"the study {spec.name!r} has not begun in {spec.storage or spec.folder}; start it with "
        f"{wording.program()} run"
    )
    file = sqlite_file(spec.storage_url)
    if file is not None and not file.exists():
        raise missing
    storage = open_storage(spec.storage_url)
    with read(spec.storage_url):
        if spec.name not in optuna.get_all_study_names(storage):
            raise missing
        study = optuna.load_study(study_name=spec.name, storage=storage)
    _read_whole(study, spec)
    return study


def _read_whole(study: optuna.Study, spec: StudySpec) -> None:
    """Reads what there is of a study, once: what is damaged is found here and nowhere else."""
    with quiet(), read(spec.storage_url):
        attributes.check(study)
        _ = study.metric_names
        _check_values(study, len(spec.objective.objectives))


def _check_values(study: optuna.Study, objectives: int) -> None:
    """Raises ``ValueError`` where results are not of the file's objectives."""
    count = len(study.directions)
    if count != objectives:
        raise ValueError(f"its study has {count} objectives, and the file {objectives}")
    for trial in study.get_trials(deepcopy=False):
        if trial.values is not None and len(trial.values) != count:
            raise ValueError(f"trial {trial.number} has {len(trial.values)} of {count} values")


def create_sampler(
    spec: StudySpec, *, mixed_in: Sequence[int] = (), source_studies: Sequence[optuna.Study] = ()
) -> optuna.samplers.BaseSampler:
    """The sampler that the file asks for.

    Args:
        spec: The study.
        mixed_in: What of the trial that it is for goes into the seeds of samplers that would
            otherwise propose their first points again in every new process.
        source_studies: Earlier studies to start from.
    """
    name, seed, options = spec.sampler.name, spec.sampler.seed, dict(spec.sampler.options)
    if name == "rl" and spec.budget.trials is not None:
        options.setdefault("n_trials", spec.budget.trials)
    if name in _FORGETFUL and mixed_in:
        seed = int(np.random.SeedSequence([seed, *mixed_in]).generate_state(1)[0])
    return samplers.create(name, seed=seed, options=options, source_studies=source_studies)


def create_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The pruner that the file asks for; its steps count evaluations."""
    return pruners.create(
        spec.pruner.name,
        spec.pruner.options,
        first_step=1,
        last_step=spec.training.evaluations,
    )


def enqueue_guides(study: optuna.Study, spec: StudySpec) -> None:
    """Sees to it that the guides' configuration comes next, once, where the file asks for it."""
    if spec.first_trial != "guides":
        return
    from optuna_lora_rl.study import guides

    with output.lock(spec.folder):
        if any(outcome.GUIDES in t.user_attrs for t in study.get_trials(deepcopy=False)):
            return
        params = guides.defaults(spec.lora_space().distributions())
        study.enqueue_trial(params, user_attrs={outcome.GUIDES: True})


def propose(spec: StudySpec, trial: optuna.Trial) -> Configuration:
    """Asks the sampler for the trial's configuration, and writes down who proposed it."""
    if spec.sampler.name in _FORGETFUL:
        trial.study.sampler = create_sampler(spec, mixed_in=_turn(trial))
    configuration = spec.lora_space().suggest(trial)
    # Only a frozen trial shows its system attributes.
    frozen = trial.study._storage.get_trial(trial._trial_id)
    proposal = samplers.proposal(frozen) or {}
    source = "retry" if outcome.RETRY_OF in trial.user_attrs else spec.sampler.name
    said = str(proposal.get("source", source))
    is_guides = outcome.GUIDES in trial.user_attrs
    trial.set_user_attr("source", outcome.GUIDES if is_guides else said)
    trial.set_user_attr("configuration", configuration)
    return configuration


def check_known(study: optuna.Study | None, spec: StudySpec) -> None:
    """Raises ``UserError`` where adapters lie in the folder that no trial can have made."""
    # Asked for in this order: a worker that has just begun has its trial before its adapter.
    if output.holds_adapters(spec.folder, spec.name) and (
        study is None or not study.get_trials(deepcopy=False)
    ):
        raise UserError(
            f"output is {str(spec.folder)!r}, which holds adapters of an earlier study "
            f"{spec.name!r} that the storage knows nothing of, and new trials would overwrite "
            "them; choose another output folder, or move best and adapters away"
        )


def check_objectives(number: int, spec: StudySpec) -> None:
    """Raises ``UserError`` where a study was begun with another number of objectives."""
    if number != spec.n_objectives:
        raise UserError(
            f"objective.objectives is {list(spec.objective.objectives)}, but the study "
            f"{spec.name!r} was begun with {number} objective(s): choose another study name or "
            "storage"
        )


def _turn(trial: optuna.Trial) -> tuple[int, ...]:
    """The trial's turn, and its number too where another trial has had that turn.

    So it is where several ran when one was cut short: those that began after it keep theirs.
    """
    trials = trial.study.get_trials(deepcopy=False)
    gone = cut_short(trials)
    turn = turn_of(trial.number, gone)
    taken = {t.user_attrs.get(outcome.TURN) for t in trials if t.number not in gone}
    trial.set_user_attr(outcome.TURN, turn)
    return (turn, trial.number) if turn in taken else (turn,)


def _forget_if_empty(
    storage: optuna.storages.BaseStorage, spec: StudySpec, n_objectives: int
) -> None:
    """Deletes a study that failed before its first trial, so that its file may still change."""
    for study in storage.get_all_studies():
        if study.study_name != spec.name or len(study.directions) == n_objectives:
            continue
        if storage.get_n_trials(study._study_id):
            check_objectives(len(study.directions), spec)
        storage.delete_study(study._study_id)


def _mend_numbers(storage: optuna.storages.RDBStorage, spec: StudySpec) -> None:
    said = {
        outcome.FAILURE: outcome.DELETED,
        outcome.MESSAGE: "the trial was deleted from the database",
    }
    for study in storage.get_all_studies():
        if study.study_name == spec.name:
            rows.mend_numbers(storage, study._study_id, said)


def load_earlier(spec: StudySpec) -> list[optuna.Study]:
    """The studies of ``transfer_from``.

    Raises:
        UserError: A storage or study that is not there, several where one is meant, or the study
            itself.
    """
    return [_load(entry.study, entry.storage, spec) for entry in spec.earlier_studies()]


def load_named(name: str | None, url: str) -> optuna.Study:
    """One study of a storage; its only one where no name is given.

    Args:
        name: The study's name.
        url: The storage's SQLAlchemy URL, or the output folder of an earlier run.

    Raises:
        UserError: As in ``load_earlier``.
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
        study = load_named(name, storage)
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
