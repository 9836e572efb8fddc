"""Stops a run that has too little chance, for what it still costs, to become the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_lora_rl.pruners.forecast import forecast
from optuna_lora_rl.pruners.rules import ForecastPruner
from optuna_lora_rl.pruners.rules import PeerPruner

if TYPE_CHECKING:
    from optuna_lora_rl.pruners.peers import Peers


class CostAwarePruner(PeerPruner, ForecastPruner):
    """Extrapolate each learning curve, and stop those that will not reach the best.

    A trial's reports are extrapolated to the last step by power laws with uncertainty, whose form
    is learned from the study's finished curves, and recalibrated by how well those kept what
    their own first reports promised (``extrapolation.py`` has the formulas and their sources;
    the stopping rule follows Domhan, Springenberg and Hutter 2015, IJCAI). Let P be the
    probability that the last report will be at least that of a rival, and R the share of the
    run's steps that are still to be done. The trial is stopped when there is a rival for which

        P / R < probability:

    its chance for each full run's worth of compute that it still asks for. A new trial in its
    place would have such a chance too: after n trials drawn alike, the next is the best so far
    with probability 1 / (n + 1), which for the tenth trial is the default. So a run that is
    nearly done is finished on a chance that would not justify beginning it.

    Rivals are finished trials, and running ones that have come as far, whose ends are forecasts
    as well: where all run at once there is no incumbent yet, and still some have no chance.
    Scores of this package charge the whole run's cost at every evaluation, so they compare as
    they stand. Two rules keep good runs: a trial is not stopped for a rival that it is level with
    at the same step, give or take the noise; and one bad evaluation stops nobody: what is said of
    all reports must also hold without the latest.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(direction="maximize", pruner=CostAwarePruner())
    >>> def objective(trial):
    ...     end = trial.suggest_float("end", 0, 1)
    ...     for step in range(1, 9):
    ...         trial.report(end - 0.3 / step, step)
    ...         if trial.should_prune():
    ...             raise optuna.TrialPruned
    ...     return end - 0.3 / 8
    >>> for end in (0.3, 0.4, 0.7, 0.9, 0.2, 0.95):
    ...     study.enqueue_trial({"end": end})
    >>> study.optimize(objective, n_trials=6)
    >>> study.trials[4].state.name, study.trials[5].state.name
    ('PRUNED', 'COMPLETE')

    Args:
        probability: The least chance, for a full run's compute, of reaching any rival.
        n_startup_trials: Finished trials, and running ones with two reports, before anybody is
            judged.
        n_warmup_steps: Reports at steps before this one are not judged.
        last_step: The step at which trials end; by default the last step of the finished trials,
            so that without it nobody is judged before the first has finished.
        noise: Standard deviation of one evaluation, in the score's unit; ``"auto"`` estimates it
            from the study's curves.

    Raises:
        ValueError: An argument is out of range.
    """

    def _judge(self, peers: Peers) -> bool:
        end = self._end(peers, len(peers.ended) + len(peers.running))
        return end is not None and all(self._hopeless(each, end) for each in peers.twice())

    def _hopeless(self, peers: Peers, last_step: int) -> bool:
        """Whether the chance to reach one of the others is too small for what the rest costs."""
        ahead = forecast(peers, last_step, self._noise)
        if ahead.end is None or ahead.running is None:
            return False
        allowed = peers.feasible[peers.complete]
        finished, ends = ahead.finished_end[allowed], ahead.running
        targets = np.concatenate([finished, ends.mean])
        deviations = np.concatenate([np.zeros(len(finished)), ends.deviation])
        now = np.concatenate([ahead.finished_now[allowed], ahead.running_now])
        better = ahead.mean < targets - math.sqrt(2) * ahead.noise
        rivals = np.flatnonzero(ahead.ahead_now(now) & better)
        least = self._probability * ahead.remaining
        return any(ahead.end.chance(targets[j], deviations[j])[0] < least for j in rivals)
