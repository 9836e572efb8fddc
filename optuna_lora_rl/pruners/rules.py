"""What pruners that judge by peers have in common, before each asks its own question."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING
from typing import Literal

import numpy as np
from optuna.pruners import BasePruner

from optuna_lora_rl.pruners import limits
from optuna_lora_rl.pruners.peers import peers_of

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.pruners.peers import Peers


class PeerPruner(BasePruner):
    """Judge the trials of a study with one objective by what their peers have reported."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Judge a trial by its reports so far; one that diverged is lost without asking."""
        if not trial.intermediate_values:
            return False
        peers = peers_of(study, trial)
        return not np.isfinite(peers.own[peers.step]) or self._judge(peers)

    @abstractmethod
    def _judge(self, peers: Peers) -> bool:
        """Whether a trial whose latest report is finite shall be stopped."""


class ForecastPruner(BasePruner):
    """Judge trials by where their curves will end; the classes made of it say what it takes."""

    # The largest `probability` that makes sense.
    _highest = 1.0

    def __init__(
        self,
        *,
        probability: float = 0.1,
        n_startup_trials: int = 4,
        n_warmup_steps: int = 0,
        last_step: int | None = None,
        noise: float | Literal["auto"] = "auto",
    ) -> None:
        limits.check_number("probability", probability, low=0, high=self._highest)
        limits.check_number("n_startup_trials", n_startup_trials, low=1)
        limits.check_number("n_warmup_steps", n_warmup_steps, low=0)
        limits.check_number("noise", noise, low=0, or_auto=True)
        if last_step is not None:
            limits.check_number("last_step", last_step, low=1)
        self._probability = probability
        self._n_startup_trials = n_startup_trials
        self._n_warmup_steps = n_warmup_steps
        self._last_step = last_step
        self._noise = noise

    def _end(self, peers: Peers, compared: int) -> int | None:
        """Return the step at which trials end; None as long as this one is not to be judged.

        Args:
            peers: The trial and its peers.
            compared: How many others it can be compared with.
        """
        end = self._last_step or peers.last_step
        if end is None or not self._n_warmup_steps <= peers.step < end:
            return None
        return end if compared >= self._n_startup_trials and peers.is_curve else None
