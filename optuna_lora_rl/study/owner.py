"""Which process runs a trial, and whether it still does: told by no clock that anybody can set."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_lora_rl.samplers import process

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OWNER = "owner"
# The runs of this process that have not ended: one process may run several studies.
_runs: set[str] = set()


class Owner:
    """A run of a study, which owns the trials that it asks for while it lasts.

    Args:
        folder: Where its adapters are.
    """

    def __init__(self, folder: Path) -> None:
        self._said = {**process.here(), "run": uuid.uuid4().hex, "folder": str(folder.absolute())}

    def __enter__(self) -> Owner:
        _runs.add(self._said["run"])
        return self

    def __exit__(self, *raised: object) -> None:
        _runs.discard(self._said["run"])

    def ask(self, study: optuna.Study) -> optuna.Trial:
        """Asks for a trial as ``Study.ask`` does, except that it has an owner at every moment.

        So a trial whose process is killed at once is told from one that was asked for to run
        elsewhere, which has none.
        """
        storage = study._storage
        # What Optuna's samplers keep of the storage between two trials, as in Study.ask.
        study._thread_local.cached_all_trials = None
        for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            try:
                storage.set_trial_user_attr(waiting._trial_id, OWNER, self._said)
                if storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                    # Once more: another worker may have tried for it at the same moment.
                    storage.set_trial_user_attr(waiting._trial_id, OWNER, self._said)
                    return optuna.Trial(study, waiting._trial_id)
            except UpdateFinishedTrialError:
                continue
        fresh = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self._said})
        return optuna.Trial(study, storage.create_new_trial(study._study_id, fresh))


def is_gone(trial: FrozenTrial) -> bool | None:
    """Whether the run that owns the trial has ended, or None where nobody here can know.

    Args:
        trial: One that is running.
    """
    said = trial.user_attrs.get(OWNER)
    if said is None:
        return None
    gone = process.is_gone(said)
    return said["run"] not in _runs if gone is False and process.is_here(said) else gone


def is_here(trial: FrozenTrial, folder: Path) -> bool:
    """Whether the trial ran on this machine, and left its adapter in the folder."""
    said = trial.user_attrs.get(OWNER)
    here = (process.machine()["host"], str(folder.absolute()))
    return said is not None and (said["host"], said["folder"]) == here


def where(trial: FrozenTrial) -> str | None:
    """The host and the folder of the trial's adapter, in words, or None where nobody said."""
    said = trial.user_attrs.get(OWNER)
    return f"{said['folder']} on {said['host']}" if said else None
