"""What the trials of a study have reported, as arrays: the one place here that reads trials.

Everything is turned so that larger is better. A report that is not finite is a run that diverged:
``-inf``, worse than any other. Trials need not report at the same steps: between two of its
reports a trial's curve is taken to be straight; before the first and after the last there is
nothing (NaN).

Only reports are compared with reports. A finished trial's value may be measured in another way
(on another split, say), and what it last reported is what a running trial's next reports are
about.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_lora_rl.pruners.extrapolation import fit

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


Reports = Mapping[int, float]

STATES = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
# So many steps say enough of the form of a curve.
_POINTS = 16
# Curves that must be long enough for their residuals to say what the noise is.
_ENOUGH_CURVES = 3
# Without them: the noise is this share of the spread of the scores that are compared.
_SHARE_OF_SPREAD = 0.1
# However smooth the curves: differences below this share of the spread mean nothing.
_LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Peers:
    """A trial's reports in one objective, and those of the others.

    Attributes:
        own: The trial's reports, larger is better.
        reports: Reports of every other trial that has any, as they were made.
        states: Their states.
        feasible: Whether they keep the study's constraints, shape (N,).
        sign: Turns a report so that larger is better.
    """

    own: Reports
    reports: Sequence[Reports]
    states: Sequence[TrialState]
    feasible: np.ndarray
    sign: float

    @property
    def step(self) -> int:
        """The trial's latest step."""
        return max(self.own)

    @cached_property
    def first_step(self) -> int:
        """The first step that any trial reported at."""
        return min(min(of) for of in (self.own, *self.reports))

    @cached_property
    def complete(self) -> np.ndarray:
        """Which of the others came to their end, shape (N,)."""
        return np.array([state == TrialState.COMPLETE for state in self.states], dtype=bool)

    @cached_property
    def pruned(self) -> np.ndarray:
        """Which of the others were pruned, shape (N,)."""
        return np.array([state == TrialState.PRUNED for state in self.states], dtype=bool)

    @cached_property
    def last(self) -> np.ndarray:
        """The latest step of each of the others, shape (N,)."""
        return np.array([max(of) for of in self.reports], dtype=float)

    @cached_property
    def ended(self) -> list[Reports]:
        """Reports of those that came to their end, as they were made."""
        return list(compress(self.reports, self.complete))

    @cached_property
    def running(self) -> list[Reports]:
        """Reports of those that run and have made two or more, as they were made."""
        pairs = zip(self.reports, self.states, strict=True)
        return [of for of, state in pairs if state == TrialState.RUNNING and len(of) > 1]

    @cached_property
    def last_step(self) -> int | None:
        """The last step of those that came to their end; None where there are none."""
        return max((max(of) for of in self.ended), default=None)

    def at_the_end(self, last_step: int | None) -> bool:
        """Whether there is nothing left to save.

        Args:
            last_step: Where trials end; None for as far as any has come that ended.
        """
        end = last_step or self.last_step
        return end is not None and self.step >= end

    @property
    def is_curve(self) -> bool:
        """Whether the trial has two reports that are numbers, so that one may be left out."""
        return sum(map(math.isfinite, self.own.values())) > 1

    def twice(self) -> tuple[Peers, Peers]:
        """The same with all of the trial's reports, and without its latest."""
        earlier = {step: value for step, value in self.own.items() if step != self.step}
        return self, replace(self, own=earlier)

    def grid(self, last_step: int | None) -> np.ndarray:
        """Steps at which curves are looked at: the trial's own and a finished one's."""
        # Any choice will do that does not depend on the order of the trials.
        longest: Reports = max(self.ended, key=lambda of: (max(of), len(of), sum(of)), default={})
        end = () if last_step is None else (last_step,)
        return np.array(sorted({*thinned(self.own), *thinned(longest), *end}), dtype=float)

    def curves(self, reports: Sequence[Reports], grid: np.ndarray) -> np.ndarray:
        """Reports of others at the steps of a grid, larger is better, shape (N, S)."""
        return curves(reports, grid, self.sign)

    def at(self, step: int) -> np.ndarray:
        """The others' reports at a step, shape (N,); NaN for those that have none there."""
        return self.curves(self.reports, np.array([step]))[:, 0]

    def behind(self, other: float, compared: np.ndarray, noise: float | str) -> bool:
        """Whether the trial's latest report is behind a score by more than noise.

        Args:
            other: The score.
            compared: What others had at the trial's step.
            noise: The user's number, or ``"auto"``.
        """
        own = self.own[self.step]
        if own >= other:
            return False
        sigma = self.noise(noise, self.grid(self.last_step), compared)
        return own < other - math.sqrt(2) * sigma

    def noise(self, wanted: float | str, grid: np.ndarray, compared: np.ndarray) -> float:
        """The standard deviation of one evaluation.

        Args:
            wanted: The user's number, or ``"auto"``: what power laws leave of the curves that
                have reported four times or more, of half of the curves at most that much. Until
                there are three of them it is a tenth of the spread of what is compared.
            grid: Steps at which curves are looked at.
            compared: The scores that are compared, whose spread bounds the noise from below.
        """
        if not isinstance(wanted, str):
            return wanted
        finite = compared[np.isfinite(compared)]
        spread = float(np.subtract(*np.quantile(finite, [0.75, 0.25]))) if len(finite) else 0.0
        long = [of for of in self.reports if len(of) > 3]
        y = np.concatenate([self.curves(long, grid), curves([self.own], grid)])
        residuals = fit(positions(grid), y).noise()
        residuals = residuals[np.isfinite(residuals)]
        if len(residuals) < _ENOUGH_CURVES:
            return _SHARE_OF_SPREAD * spread
        return max(float(np.median(residuals)), _LEAST_SHARE * spread)


def peers_of(study: Study, trial: FrozenTrial) -> Peers:
    """Read a trial and its peers from a study with one objective."""
    trials = others(study, trial)
    reports = [other.intermediate_values for other in trials]
    return gathered(trial.intermediate_values, trials, reports, study.direction)


def gathered(
    own: Reports,
    trials: Sequence[FrozenTrial],
    reports: Sequence[Reports],
    direction: StudyDirection,
) -> Peers:
    """Put together a trial's reports and those of the trials that have any."""
    sign = 1.0 if direction == StudyDirection.MAXIMIZE else -1.0
    some = [(trial, of) for trial, of in zip(trials, reports, strict=True) if of]
    return Peers(
        own={step: sign * v if math.isfinite(v) else -math.inf for step, v in own.items()},
        reports=[of for _, of in some],
        states=[trial.state for trial, _ in some],
        feasible=np.array([feasible(trial) for trial, _ in some], dtype=bool),
        sign=sign,
    )


def others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """The study's other trials that run, ended or were pruned, whoever runs them."""
    trials = study.get_trials(deepcopy=False, states=STATES)
    return [other for other in trials if other.number != trial.number]


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps the study's constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def curves(reports: Sequence[Reports], grid: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """Reports at the steps of a grid, shape (N, S); NaN outside a trial's own course.

    Args:
        reports: Of each trial, one at least.
        grid: Steps.
        sign: What reports are multiplied with.
    """
    steps, shape = [int(step) for step in grid], (len(reports), len(grid))
    nan = float("nan")
    there = np.array([[step in of for step in steps] for of in reports], dtype=bool)
    values = np.array([[of.get(step, nan) for step in steps] for of in reports], dtype=float)
    y, there = sign * values.reshape(shape), there.reshape(shape)
    y[there & ~np.isfinite(y)] = -np.inf
    if there.all():
        return y
    first = np.array([min(of) for of in reports])[:, None]
    last = np.array([max(of) for of in reports])[:, None]
    gaps = ~there & (grid >= first) & (grid <= last)
    for row in np.flatnonzero(gaps.any(axis=1)).tolist():
        own = sorted(reports[row].items())
        missing = np.interp(grid[gaps[row]], [step for step, _ in own], [v for _, v in own])
        # Between a score and a divergence there is no straight line.
        y[row, gaps[row]] = np.where(np.isfinite(missing), sign * missing, -np.inf)
    return y


def thinned(steps: Collection[int]) -> list[int]:
    """At most so many of the steps as say enough of a curve, the first and the last among them."""
    ordered = sorted(steps)
    chosen = np.linspace(0, len(ordered) - 1, _POINTS).round().astype(int).tolist()
    return [ordered[index] for index in chosen] if len(ordered) > _POINTS else ordered


def positions(grid: np.ndarray) -> np.ndarray:
    """Steps as positive times: a first step of 0 is moved by the gap to the next one."""
    if grid[0] > 0:
        return grid
    gap = grid[1] - grid[0] if len(grid) > 1 else 1.0
    return grid - grid[0] + gap


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    or_auto: bool = False,
) -> None:
    """Refuse what is no number from ``low`` to ``high``, both included.

    Raises:
        ValueError: In one sentence that names the argument.
    """
    if or_auto and value == "auto":
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:  # type: ignore[operator]
        return
    span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    auto = " or 'auto'" if or_auto else ""
    raise ValueError(f"{name} is {value!r}, but must be a number, {span}{auto}")


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
