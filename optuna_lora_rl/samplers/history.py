"""What a study's trials say, as arrays: the history is all the state that a sampler has.

Notations
    n     number of trials that bear on the space (finished or running)
    m     number of objectives
    d     number of dimensions of the space

Scores are larger-is-better for every direction. A sampler that computes its proposal from a
:class:`History` alone resumes, runs in many processes and survives kills without further state.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.pruners.pareto import REPORTED
from optuna_lora_rl.samplers.cut_short import cut_short
from optuna_lora_rl.samplers.memory import unlike

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# Values of system attributes are columns of 2048 characters in relational storages.
_CHUNK = 2045
# Arrays are compared with plain numbers much faster than with Optuna's own.
_RUNNING, _PRUNED = int(TrialState.RUNNING), int(TrialState.PRUNED)
RELATIVE_PARAMS_KEY = "optuna_lora_rl:relative_params"


@dataclass(frozen=True)
class History:
    """Trials as arrays, in the order of their numbers.

    Trials that were cut short (:mod:`optuna_lora_rl.samplers.cut_short`) are left out.

    Args:
        numbers: trial numbers, shape (n,).
        turns: the same less the trials before each that were cut short, shape (n,).
        points: configurations in the unit cube, shape (n, d); NaN where a parameter is absent.
        asked: which parameters the objective asked for, shape (n, d); elsewhere a point may hold
            what was only proposed.
        scores: larger is better, shape (n, m); NaN where nothing is known (failed, running).
        failed: shape (n,), trials that ended without a value.
        running: shape (n,), trials whose result is awaited.
        pruned: shape (n,), trials that were stopped early; their scores are estimates.
        violation: sum of the violated constraints, shape (n,); 0 when feasible or unknown.
        constraints: their values, shape (n, number of constraints), feasible when all <= 0; NaN
            where a trial did not set one.
        unfinished: places, in the list that was read, of trials that had not finished.
        turn: of the trial that is being proposed; 0 where none is.
    """

    numbers: np.ndarray
    turns: np.ndarray
    points: np.ndarray
    asked: np.ndarray
    scores: np.ndarray
    failed: np.ndarray
    running: np.ndarray
    pruned: np.ndarray
    violation: np.ndarray
    constraints: np.ndarray
    unfinished: tuple[int, ...] = ()
    turn: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def scored(self) -> np.ndarray:
        """Shape (n,), trials that have a score."""
        return ~(self.failed | self.running) & ~np.isnan(self.scores).any(axis=1)

    def select(self, rows: np.ndarray) -> History:
        """The trials at ``rows`` (indices or a mask); what is not known of each is left out."""
        return History(
            self.numbers[rows],
            self.turns[rows],
            self.points[rows],
            self.asked[rows],
            self.scores[rows],
            self.failed[rows],
            self.running[rows],
            self.pruned[rows],
            self.violation[rows],
            self.constraints[rows],
        )


def space_of(
    distributions: Mapping[str, BaseDistribution],
    roles: Mapping[str, str] | None = None,
    *,
    said: bool = False,
) -> Space:
    """The unit cube of a search space, its dimensions sorted by name.

    Args:
        distributions: by parameter name.
        roles: given by the user, by parameter name.
        said: whether it is known to be a LoRA study's, whatever the names.
    """
    dimensions = [_dimension(name, distributions[name]) for name in sorted(distributions)]
    return make_space(dimensions, roles, said=said)


def _dimension(name: str, distribution: BaseDistribution) -> Dimension:
    if isinstance(distribution, CategoricalDistribution):
        return Dimension(name, "categorical", choices=tuple(distribution.choices))
    if isinstance(distribution, IntDistribution):
        low, high, step = distribution.low, distribution.high, distribution.step
        return Dimension(name, "int", low, high, distribution.log, step)
    assert isinstance(distribution, FloatDistribution)
    return Dimension(
        name,
        "float",
        float(distribution.low),
        float(distribution.high),
        distribution.log,
        distribution.step,
    )


def publish(storage: BaseStorage, trial_id: int, params: Mapping[str, Any]) -> None:
    """Store proposed parameters at once, where other workers' samplers see them.

    A define-by-run trial stores a parameter only when the objective suggests it; until then
    other workers would propose the same point.
    """
    text = json.dumps(dict(params))
    for start in range(0, len(text), _CHUNK):
        key = f"{RELATIVE_PARAMS_KEY}:{start // _CHUNK}"
        storage.set_trial_system_attr(trial_id, key, text[start : start + _CHUNK])


def parameters_of(trial: FrozenTrial, *, unused: bool = False) -> dict[str, Any]:
    """A trial's parameters; for a running one also those that were proposed but not yet asked.

    Args:
        trial: any trial.
        unused: for a finished trial also what was proposed but never asked for, since the
            objective's conditions did not need it.
    """
    if trial.state.is_finished() and not unused:
        return trial.params
    chunks: list[str] = []
    while (chunk := trial.system_attrs.get(f"{RELATIVE_PARAMS_KEY}:{len(chunks)}")) is not None:
        chunks.append(chunk)
    fixed = trial.system_attrs.get("fixed_params", {})
    try:
        # A second, shorter proposal leaves chunks of the first behind it.
        proposed = json.JSONDecoder().raw_decode("".join(chunks))[0] if chunks else {}
    except json.JSONDecodeError:
        # Another process is between two chunks; what the trial has suggested so far must do.
        proposed = {}
    return {**proposed, **fixed, **trial.params}


def is_taken(
    params: Mapping[str, Any],
    number: int,
    study: Study,
    begun: tuple[Sequence[int], int],
) -> bool:
    """Whether another trial has these parameters that was not finished when the study was read.

    It may have ended since: its result was not known then, and the same once more is a repeat.

    Args:
        params: proposed for a trial.
        number: of that trial.
        study: to look in.
        begun: the places of the trials that had not finished, and the length of the list, when
            the study was last read; what had finished then is no candidate any more.
    """
    places, known = begun
    trials = study.get_trials(deepcopy=False)
    others = [trials[i] for i in places if i < len(trials)] + trials[known:]
    gone = cut_short(others)
    return any(
        t.state != TrialState.WAITING
        and t.number != number
        and t.number not in gone
        and parameters_of(t, unused=True) == params
        for t in others
    )


def read_history(
    trials: Iterable[FrozenTrial],
    space: Space,
    directions: Sequence[StudyDirection],
    *,
    current: int | None = None,
    unused: bool = False,
) -> History:
    """Read the trials that have at least one parameter of the space.

    Args:
        trials: the study's trials in any order; waiting ones are skipped.
        space: the dimensions to read.
        directions: one per objective.
        current: number of the trial that is being proposed; it is left out.
        unused: place a trial also by proposed parameters that its objective did not ask for.
    """
    return Ledger().read(list(trials), space, directions, current=current, unused=unused)


class Ledger:
    """Reads a study again and again, each finished trial once.

    A finished trial does not change, so what was read of it holds as long as the same object
    stands at the same place of the list and the space is the same. Whatever else is in the list
    (another study, a filtered one) is read anew: the answer is that of :func:`read_history`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: object = None
        self._seen: list[FrozenTrial | None] = []
        self._rows: list[_Row] = []
        # Whether any trial says more than parameters and values.
        self._more = False
        self._open: tuple[int, ...] = ()
        self._points = np.zeros((0, 0))
        # Whether a trial has begun and has a parameter of the space.
        self._bears = np.zeros(0, dtype=bool)
        self._asked = np.zeros((0, 0), dtype=bool)
        self._values = np.zeros((0, 0))
        self._numbers = np.zeros(0, dtype=int)
        self._states = np.zeros(0, dtype=int)

    def read(
        self,
        trials: Sequence[FrozenTrial],
        space: Space,
        directions: Sequence[StudyDirection],
        *,
        current: int | None = None,
        unused: bool = False,
    ) -> History:
        """The history; see :func:`read_history`."""
        sign = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions])
        with self._lock:
            self._update(trials, space, sign, current, unused)
            n = len(trials)
            gone = np.array(sorted(cut_short(trials)), dtype=int)
            bears = self._bears[:n] & (self._numbers[:n] != current)
            order = np.flatnonzero(bears & ~np.isin(self._numbers[:n], gone))
            numbers = self._numbers[order]
            if not (numbers[1:] >= numbers[:-1]).all():
                order = order[np.argsort(numbers, kind="stable")]
                numbers = self._numbers[order]
            rows = [self._rows[i] for i in order.tolist()] if self._more else []
            taken = _run(order)
            states, unfinished = self._states[taken].copy(), self._open
            points, asked = self._points[taken].copy(), self._asked[taken].copy()
            scores = self._values[taken].copy()
        if rows:
            _estimate_pruned(rows, states, sign, scores)
        constraints = _constraints(rows) if rows else np.zeros((len(order), 0))
        has_score = ~np.isnan(scores).any(axis=1)
        running = states == _RUNNING
        return History(
            numbers=numbers,
            turns=numbers - np.searchsorted(gone, numbers),
            points=points,
            asked=asked,
            scores=scores,
            failed=~running & ~has_score,
            running=running,
            pruned=states == _PRUNED,
            violation=np.where(constraints > 0.0, constraints, 0.0).sum(axis=1),
            constraints=constraints,
            unfinished=unfinished,
            turn=0 if current is None else current - int(np.searchsorted(gone, current)),
        )

    def _update(
        self,
        trials: Sequence[FrozenTrial],
        space: Space,
        sign: np.ndarray,
        current: int | None,
        unused: bool,
    ) -> None:
        key = (space, sign.tobytes(), unused)
        if key != self._key:
            self._key, self._seen, self._rows, self._more = key, [], [], False
        known = len(self._seen)
        fresh = unlike(trials, self._seen)
        fresh += range(known, len(trials))
        self._make_room(len(trials), len(space), len(sign))
        missing = len(trials) - known
        self._seen += [None] * missing
        self._rows += [_NOTHING] * missing
        for i in fresh:
            trial = trials[i]
            finished = trial.state.is_finished()
            self._seen[i] = trial if finished else None
            constraints, reports = trial.constraints, reports_of(trial, len(sign))
            self._rows[i] = _Row(constraints, reports) if constraints or reports else _NOTHING
            self._more |= bool(constraints) or trial.state == TrialState.PRUNED
            self._numbers[i], self._states[i] = trial.number, trial.state
            self._bears[i] = False
            if finished or (trial.state == TrialState.RUNNING and trial.number != current):
                self._points[i] = space.encode(parameters_of(trial, unused=unused))
                self._bears[i] = not np.isnan(self._points[i]).all()
                self._asked[i] = [name in trial.params for name in space.names]
            self._values[i] = math.nan
            if trial.state == TrialState.COMPLETE and trial.values is not None:
                self._values[i] = sign * np.array(trial.values, dtype=float)
        self._open = tuple(i for i in fresh if self._seen[i] is None)

    def _make_room(self, n: int, d: int, m: int) -> None:
        size = len(self._numbers)
        if n <= size and self._points.shape[1] == d and self._values.shape[1] == m:
            return
        size = max(2 * n, 64) if n > size else size
        widths = (("_points", d), ("_asked", d), ("_values", m))
        for name, width in widths:
            old = getattr(self, name)
            new = np.zeros((size, width), dtype=old.dtype)
            if old.shape[1] == width:
                new[: len(old)] = old
            setattr(self, name, new)
        for name in ("_numbers", "_states", "_bears"):
            old = getattr(self, name)
            more = np.zeros(size - len(old), dtype=old.dtype)
            setattr(self, name, np.concatenate([old, more]))


def _run(order: np.ndarray) -> np.ndarray | slice:
    """Places in ascending order without a gap as a slice, which copies much faster."""
    if len(order) and order[-1] - order[0] + 1 == len(order) and (np.diff(order) == 1).all():
        return slice(int(order[0]), int(order[-1]) + 1)
    return order


@dataclass(frozen=True)
class _Row:
    """What a trial says beside its parameters and values."""

    constraints: Mapping[str, float]
    reports: Mapping[int, Sequence[float]]


_NOTHING = _Row({}, {})


def _constraints(rows: Sequence[_Row]) -> np.ndarray:
    told = [row.constraints for row in rows]
    keys = sorted({key for constraints in told for key in constraints})
    if not keys:
        return np.zeros((len(rows), 0))
    values = [[constraints.get(key, math.nan) for key in keys] for constraints in told]
    return np.array(values, dtype=float).reshape(len(rows), len(keys))


def _estimate_pruned(
    rows: Sequence[_Row], states: np.ndarray, sign: np.ndarray, scores: np.ndarray
) -> None:
    """Fill in the final scores of pruned trials, objective by objective.

    A pruned trial is compared with the completed ones at its own last step: it gets the final
    score that stands at the same quantile; with one objective at most the median, since it was
    judged not worth finishing. With nothing to compare with at that step, its last report is
    taken as it is, at most the best completed score. Without any report it stays unknown (and
    counts as failed).
    """
    complete = np.flatnonzero(states == TrialState.COMPLETE)
    highest = 0.5 if len(sign) == 1 else 1.0
    unknown = (math.nan,) * len(sign)
    at: dict[int, np.ndarray] = {}
    for i in np.flatnonzero(states == TrialState.PRUNED).tolist():
        if not rows[i].reports:
            continue
        step = max(rows[i].reports)
        if step not in at:
            told = [rows[j].reports.get(step, unknown) for j in complete.tolist()]
            at[step] = sign * np.array(told, dtype=float).reshape(len(complete), len(sign))
        for k, value in enumerate(sign * np.array(rows[i].reports[step], dtype=float)):
            if math.isnan(value):
                continue
            finals, at_step = scores[complete, k], at[step][:, k]
            known = ~np.isnan(at_step)
            if known.sum() >= 2:
                quantile = min(float(np.mean(at_step[known] <= value)), highest)
                # Nothing lies between a number and infinity.
                smooth = np.abs(finals[known]).max() < 1e300
                scores[i, k] = np.quantile(
                    finals[known], quantile, method="linear" if smooth else "lower"
                )
            elif len(complete):
                scores[i, k] = min(value, float(finals.max()))
            else:
                scores[i, k] = value


def reports_of(trial: FrozenTrial, n_objectives: int) -> dict[int, Sequence[float]]:
    """What a trial reported, by step; with several objectives through ``pruners.report``."""
    if n_objectives == 1:
        return {step: (value,) for step, value in trial.intermediate_values.items()}
    return {
        int(key.removeprefix(REPORTED)): values
        for key, values in trial.system_attrs.items()
        if key.startswith(REPORTED)
    }
