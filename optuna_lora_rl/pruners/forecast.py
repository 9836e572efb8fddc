"""Where a trial will end, next to where finished trials have ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from optuna_lora_rl.pruners.extrapolation import extrapolate
from optuna_lora_rl.pruners.extrapolation import latest
from optuna_lora_rl.pruners.peers import curves
from optuna_lora_rl.pruners.peers import positions

if TYPE_CHECKING:
    from optuna_lora_rl.pruners.extrapolation import Ends
    from optuna_lora_rl.pruners.peers import Peers


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
