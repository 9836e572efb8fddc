"""What a study needs of its database and Optuna's storages do not offer: numbers and silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.trial import TrialState
from sqlalchemy import func
from sqlalchemy import select

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def mend_numbers(storage: RDBStorage, study_id: int, attributes: dict[str, str]) -> None:
    """Gives every trial a number of its own, and every number a trial.

    Optuna counts a trial's number from the rows before it, finds trials by their numbers, and
    reads them into a list by number. Where somebody deleted a row, the next trial would get the
    number of another one and hide it. A failed trial takes the deleted one's place.

    Args:
        storage: The database.
        study_id: The study's.
        attributes: What is written down with the trials that take a place.
    """
    from optuna.storages._rdb import models

    trial = models.TrialModel
    with storage.scoped_session() as session:
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        of_study = select(trial.trial_id, trial.number).where(trial.study_id == study_id)
        rows = session.execute(of_study.order_by(trial.trial_id.desc())).all()
        free = _free_numbers([number for _, number in rows])
        taken: set[int] = set()
        for trial_id, number in rows:
            # Of two with one number the newer keeps it: the adapter of that number is its.
            if number in taken and free:
                session.get_one(trial, trial_id).number = free.pop()
            taken.add(number)
        for number in free:
            _add_failed(session, study_id, number, attributes)
        session.commit()


def silent_trials(study: optuna.Study) -> set[int]:
    """Ids of running trials whose last sign of life is too long ago, by the database's clock."""
    storage: Any = study._storage
    if not is_heartbeat_enabled(storage):
        return set()
    return set(storage._get_stale_trial_ids(study._study_id))


def begin_silence(study: optuna.Study, trial_id: int) -> None:
    """Counts a trial's silence from now on, if it has never given a sign of life."""
    from optuna.storages._rdb import models

    storage: Any = study._storage
    if not is_heartbeat_enabled(storage):
        return
    signs = select(func.count()).where(models.TrialHeartbeatModel.trial_id == trial_id)
    with storage._backend.scoped_session() as session:
        never = session.scalar(signs) == 0
    if never:
        storage.record_heartbeat(trial_id)


def _free_numbers(numbers: Sequence[int]) -> list[int]:
    return sorted(set(range(max(numbers, default=-1))) - set(numbers))


def _add_failed(session: Session, study_id: int, number: int, attributes: dict[str, str]) -> None:
    from optuna.storages._rdb import models

    now = datetime.now()
    row = models.TrialModel(
        study_id=study_id,
        number=number,
        state=TrialState.FAIL,
        datetime_start=now,
        datetime_complete=now,
    )
    session.add(row)
    session.flush()
    for key, value in attributes.items():
        session.add(
            models.TrialUserAttributeModel(
                trial_id=row.trial_id, key=key, value_json=json.dumps(value)
            )
        )
