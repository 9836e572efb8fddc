"""Which process runs a trial, and whether it still does: told by no clock that anybody can set."""

from __future__ import annotations

import os
import socket
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

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
        self._said = {**_here(), "run": uuid.uuid4().hex, "folder": str(folder.absolute())}

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
    said, here = trial.user_attrs.get(OWNER), _here()
    if said is None or said["host"] != here["host"]:
        return None
    if said["boot"] != here["boot"]:
        # The machine was started again, unless it is another one of that name.
        return True if said["machine"] and said["machine"] == here["machine"] else None
    if said["namespace"] != here["namespace"]:
        # Another container, whose processes are not seen from here.
        return None
    if said["pid"] == here["pid"] and said["started"] == here["started"]:
        return said["run"] not in _runs
    # A process number may have been given to another process since.
    return _started(said["pid"]) != said["started"]


def is_here(trial: FrozenTrial, folder: Path) -> bool:
    """Whether the trial ran on this machine, and left its adapter in the folder."""
    said = trial.user_attrs.get(OWNER)
    here = (_machine()["host"], str(folder.absolute()))
    return said is not None and (said["host"], said["folder"]) == here


def where(trial: FrozenTrial) -> str | None:
    """The host and the folder of the trial's adapter, in words, or None where nobody said."""
    said = trial.user_attrs.get(OWNER)
    return f"{said['folder']} on {said['host']}" if said else None


def _here() -> dict[str, Any]:
    return {**_machine(), "pid": os.getpid(), "started": _started(os.getpid())}


@cache
def _machine() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        # Hosts that are called the same are told apart by it.
        "machine": _line("/etc/machine-id"),
        # The kernel draws it at every start.
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "namespace": _process_namespace(),
    }


def _process_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> float | None:
    """When a process began, or None when it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not psutil.LINUX:
            return process.create_time()
    except psutil.Error:
        return None
    # In ticks since the machine's start: psutil adds that start by the wall clock, which moves.
    stat = _line(f"/proc/{pid}/stat")
    return float(stat.rpartition(")")[2].split()[19]) if stat else None


def _line(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
