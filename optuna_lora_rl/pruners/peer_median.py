"""The median rule over all trials that have come as far."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Literal

import numpy as np

from optuna_lora_rl.pruners.peers import PeerPruner
from optuna_lora_rl.pruners.peers import check_number

if TYPE_CHECKING:
    from optuna_lora_rl.pruners.peers import Peers


class PeerMedianPruner(PeerPruner):
    """Stop a trial that is behind the median of its peers at the same step.

    Peers are all other trials, running, pruned and finished, that have reported at the step, or
    before and after it, and are then taken to lie on the straight line between; Optuna's
    ``MedianPruner`` compares with finished trials alone and so judges nobody as long as all run
    at once. Those that were pruned before the step count as behind: without them the median would
    be that of the survivors of every earlier median, and eight evaluations in a row would leave
    one in 256. The rule is the median stopping rule of Google Vizier (Golovin et al.
    2017, KDD, section 3.2.2), with the latest report in place of running averages. Trials behind
    the median by less than the noise go on.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> pruner = PeerMedianPruner(n_min_trials=3, noise=0.01)
    >>> study = optuna.create_study(direction="maximize", pruner=pruner)
    >>> running = [study.ask() for _ in range(4)]
    >>> for trial, score in zip(running, (0.3, 0.5, 0.7, 0.1)):
    ...     trial.report(score, step=1)
    >>> [trial.should_prune() for trial in running]
    [True, False, False, True]

    Args:
        percentile: A trial is stopped when it is behind the best so many percent; 50 is the
            median.
        n_min_trials: Others that must have come to the step, or have been pruned before it,
            before anybody is judged.
        n_warmup_steps: Reports at steps before this one are not judged.
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
        percentile: float = 50.0,
        n_min_trials: int = 4,
        n_warmup_steps: int = 0,
        last_step: int | None = None,
        noise: float | Literal["auto"] = "auto",
    ) -> None:
        check_number("percentile", percentile, low=0, high=100)
        check_number("n_min_trials", n_min_trials, low=1)
        check_number("n_warmup_steps", n_warmup_steps, low=0)
        check_number("noise", noise, low=0, or_auto=True)
        if last_step is not None:
            check_number("last_step", last_step, low=1)
        self._percentile = percentile
        self._n_min_trials = n_min_trials
        self._n_warmup_steps = n_warmup_steps
        self._last_step = last_step
        self._noise = noise

    def _judge(self, peers: Peers) -> bool:
        if peers.at_the_end(self._last_step) or peers.step < self._n_warmup_steps:
            return False
        there = peers.at(peers.step)
        there[peers.pruned & (peers.last < peers.step)] = -np.inf
        there = there[~np.isnan(there)]
        if len(there) < self._n_min_trials:
            return False
        # A rank, not an interpolation: half way to a diverged peer is nowhere.
        cut = np.quantile(there, 1 - self._percentile / 100, method="lower")
        return peers.behind(float(cut), there, self._noise)
