"""Stops a run that has too little chance, for what it still costs, to become the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING
from typing import Literal

import numpy as np
from optuna.pruners import BasePruner

from optuna_lora_rl.pruners.extrapolation import extrapolate
from optuna_lora_rl.pruners.extrapolation import latest
from optuna_lora_rl.pruners.peers import PeerPruner
from optuna_lora_rl.pruners.peers import check_number
from optuna_lora_rl.pruners.peers import curves
from optuna_lora_rl.pruners.peers import positions

if TYPE_CHECKING:
    from optuna_lora_rl.pruners.extrapolation import Ends
    from optuna_lora_rl.pruners.peers import Peers


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
        check_number("probability", probability, low=0, high=self._highest)
        check_number("n_startup_trials", n_startup_trials, low=1)
        check_number("n_warmup_steps", n_warmup_steps, low=0)
        check_number("noise", noise, low=0, or_auto=True)
        if last_step is not None:
            check_number("last_step", last_step, low=1)
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


@dataclass(frozen=True)
class Forecast:
    """A trial's forecast in one objective, larger is better.

    Attributes:
        end: Where the trial will end; None where that is known.
        mean: The expected end.
        deviation: Its standard deviation, that of the last evaluation included.
        noise: Standard deviation of one evaluation.
        now: The trial's latest report.
        finished_now: What finished trials had at this step, shape (M,); NaN where nothing.
        finished_end: What finished trials reported last, shape (M,).
        running_now: What other running trials that came as far had at this step, shape (K,).
        running: Where they will end; None where the trial's own end is known.
        remaining: Share of the run's steps that are still to be done.
    """

    end: Ends | None
    mean: float
    deviation: float
    noise: float
    now: float
    finished_now: np.ndarray
    finished_end: np.ndarray
    running_now: np.ndarray
    running: Ends | None
    remaining: float

    def ahead_now(self, others: np.ndarray) -> np.ndarray:
        """Which others were ahead at this step by more than noise, given what they had there.

        Those that had nothing to compare with at this step may have been.
        """
        return ~(others <= self.now + math.sqrt(2) * self.noise)


def forecast(peers: Peers, last_step: int, noise: float | str) -> Forecast:
    """Forecast a trial's end in one objective.

    Args:
        peers: The trial, which has a finite report, and its peers.
        last_step: The step at which trials end, after the trial's latest.
        noise: The user's number, or ``"auto"``.
    """
    grid = peers.grid(last_step)
    t = positions(grid)
    finished = _finite(peers.curves(peers.ended, grid))
    # Those that have come as far, and have not ended.
    others = [of for of in peers.running if peers.step <= max(of) < last_step]
    running = _finite(peers.curves(others, grid))
    # One that has reported no number has no curve to go on with.
    numbers = np.isfinite(running).any(axis=1)
    others, running = list(compress(others, numbers)), running[numbers]
    own = _finite(curves([peers.own], grid))
    sigma = peers.noise(noise, grid, latest(finished))
    now = peers.own[peers.step]
    forecast = Forecast(
        end=None,
        mean=now,
        deviation=0.0,
        noise=0.0,
        now=now,
        finished_now=peers.at(peers.step)[peers.complete],
        finished_end=_last_reports(peers),
        running_now=peers.curves(others, np.array([peers.step]))[:, 0],
        running=None,
        remaining=1 - float(np.interp(peers.step, grid, t)) / float(t[-1]),
    )
    if _is_flat(np.concatenate([finished, running, own])):
        return forecast
    # Curves that have not ended say less of their form, and more than none.
    known = finished if len(finished) else running
    every = extrapolate(t, np.concatenate([own, running]), known, noise=sigma)
    return replace(
        forecast,
        end=every.of(slice(0, 1)),
        running=every.of(slice(1, None)),
        mean=float(every.mean[0]),
        deviation=float(every.deviation[0]),
        noise=sigma,
    )


def _last_reports(peers: Peers) -> np.ndarray:
    ends = np.array([of[max(of)] for of in peers.ended], dtype=float)
    return np.where(np.isfinite(ends), peers.sign * ends, -np.inf)


def _finite(y: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(y), y, np.nan)


def _is_flat(y: np.ndarray) -> bool:
    """Whether no curve ever moves, as where a cost is known from the start."""
    high, low = np.where(np.isnan(y), -np.inf, y), np.where(np.isnan(y), np.inf, y)
    return bool(np.all(high.max(axis=1) <= low.min(axis=1)))
