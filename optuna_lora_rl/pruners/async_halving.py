"""Asynchronous successive halving over all trials that have come as far."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Literal

import numpy as np

from optuna_lora_rl.pruners.peers import PeerPruner
from optuna_lora_rl.pruners.peers import check_number

if TYPE_CHECKING:
    from optuna_lora_rl.pruners.peers import Peers


class AsyncHalvingPruner(PeerPruner):
    """Keep the best 1/``reduction_factor`` of the trials at each rung, without waiting.

    Rungs stand at ``min_resource * reduction_factor ** k``. A trial is judged as it reports at a
    rung, or first past it, against all trials that have come as far: running, pruned and finished
    ones, at the same step, where a trial that reported before and after it but not there is
    taken to lie on the straight line between. This is the stopping rule of asynchronous successive
    halving (ASHA: Li et al. 2020, MLSys, arXiv 1810.05934; there trials are promoted, here they
    go on unless they fall behind, as in Ray Tune and Syne Tune). Two things are ours: fewer than
    ``n_min_trials`` others judge nobody, so that the first trials of a study are not cut down to
    one; and a trial that is behind the last of the kept ones by less than the noise goes on.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> pruner = AsyncHalvingPruner(reduction_factor=2, n_min_trials=3, noise=0.01)
    >>> study = optuna.create_study(direction="maximize", pruner=pruner)
    >>> def objective(trial):
    ...     for step in range(1, 9):
    ...         trial.report(trial.suggest_float("x", 0, 1) * (1 - 0.5 / step), step)
    ...         if trial.should_prune():
    ...             raise optuna.TrialPruned
    ...     return trial.params["x"]
    >>> for x in (0.5, 0.9, 0.7, 0.1):
    ...     study.enqueue_trial({"x": x})
    >>> study.optimize(objective, n_trials=4)
    >>> [trial.last_step for trial in study.trials]
    [8, 8, 8, 1]

    Args:
        min_resource: Step of the first rung; ``"auto"`` is the first step that any trial of the
            study reported at.
        reduction_factor: One in so many goes on at each rung, and rungs are so many times apart.
        n_min_trials: Others that must have reported at the step before anybody is judged.
        last_step: The step at which trials end, which is not judged; by default the last step of
            the finished trials, who may have ended early.
        noise: Standard deviation of one evaluation, in the score's unit; ``"auto"`` estimates it
            from the study's curves.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        min_resource: int | Literal["auto"] = "auto",
        reduction_factor: int = 4,
        n_min_trials: int = 4,
        last_step: int | None = None,
        noise: float | Literal["auto"] = "auto",
    ) -> None:
        check_number("min_resource", min_resource, low=1, or_auto=True)
        check_number("reduction_factor", reduction_factor, low=2)
        check_number("n_min_trials", n_min_trials, low=1)
        check_number("noise", noise, low=0, or_auto=True)
        if last_step is not None:
            check_number("last_step", last_step, low=1)
        self._min_resource = min_resource
        self._reduction_factor = reduction_factor
        self._n_min_trials = n_min_trials
        self._last_step = last_step
        self._noise = noise

    def _judge(self, peers: Peers) -> bool:
        if peers.at_the_end(self._last_step) or not self._at_rung(peers):
            return False
        there = peers.at(peers.step)
        there = np.sort(there[~np.isnan(there)])[::-1]
        if len(there) < self._n_min_trials:
            return False
        kept = max(1, (len(there) + 1) // self._reduction_factor)
        # As good as the last of so many others is among them.
        return peers.behind(float(there[kept - 1]), there, self._noise)

    def _at_rung(self, peers: Peers) -> bool:
        """Whether the latest report is the trial's first one at or past a rung."""
        # Step 0 is a multiple of every factor, and no rung.
        rung = max(1, peers.first_step) if self._min_resource == "auto" else self._min_resource
        if peers.step < rung:
            return False
        while rung * self._reduction_factor <= peers.step:
            rung *= self._reduction_factor
        return all(step == peers.step or step < rung for step in peers.own)
