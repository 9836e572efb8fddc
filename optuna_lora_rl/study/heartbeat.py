"""Signs of life of the running trials, so that other workers notice when this one dies."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

from optuna.exceptions import StorageInternalError

if TYPE_CHECKING:
    import optuna


class Heartbeat:
    """Gives the signs that ``Study.optimize`` gives for one trial, for many, from one thread.

    Args:
        study: One whose storage was opened with a heartbeat.
    """

    def __init__(self, study: optuna.Study) -> None:
        # Optuna's class for storages with a heartbeat is private.
        self._storage = cast(Any, study._storage)
        self._interval: int = self._storage.get_heartbeat_interval()
        self._trials: frozenset[int] = frozenset()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def begins(self, trial: optuna.Trial) -> None:
        """Gives the first sign of a trial at once, and the others while it runs."""
        self._storage.record_heartbeat(trial._trial_id)
        self._trials |= {trial._trial_id}

    def ends(self, trial: optuna.Trial) -> None:
        """Stops the signs of a trial."""
        self._trials -= {trial._trial_id}

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            for trial_id in sorted(self._trials):
                try:
                    self._storage.record_heartbeat(trial_id)
                except StorageInternalError:
                    # A database that is away for a moment; where it stays away, the main thread
                    # says so.
                    break
        self._storage.remove_session()
