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

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

# Values of system attributes are columns of 2048 characters in relational storages.
_CHUNK = 2045
RELATIVE_PARAMS_KEY = "optuna_lora_rl:relative_params"


@dataclass(frozen=True)
class History:
    """Trials as arrays, in the order of their numbers.

    Args:
        numbers: trial numbers, shape (n,).
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
    """

    numbers: np.ndarray
    points: np.ndarray
    asked: np.ndarray
    scores: np.ndarray
    failed: np.ndarray
    running: np.ndarray
    pruned: np.ndarray
    violation: np.ndarray
    constraints: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def scored(self) -> np.ndarray:
        """Shape (n,), trials that have a score."""
        return ~(self.failed | self.running) & ~np.isnan(self.scores).any(axis=1)

    def select(self, rows: np.ndarray) -> History:
        """The trials at ``rows`` (indices or a mask)."""
        return History(
            self.numbers[rows],
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
    distributions: Mapping[str, BaseDistribution], roles: Mapping[str, str] | None = None
) -> Space:
    """The unit cube of a search space, its dimensions sorted by name."""
    return make_space(
        [_dimension(name, distributions[name]) for name in sorted(distributions)], roles
    )


def _dimension(name: str, distribution: BaseDistribution) -> Dimension:
    if isinstance(distribution, CategoricalDistribution):
        return Dimension(name, "categorical", choices=tuple(distribution.choices))
    if isinstance(distribution, IntDistribution):
        low, high, step = distribution.low, distribution.high, distribution.step
        return Dimension(name, "int", float(low), float(high), distribution.log, float(step))
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
        proposed = json.loads("".join(chunks)) if chunks else {}
    except json.JSONDecodeError:
        # Another process is between two chunks; what the trial has suggested so far must do.
        proposed = {}
    return {**proposed, **fixed, **trial.params}


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
    told = [
        trial
        for trial in sorted(trials, key=lambda trial: trial.number)
        if trial.number != current and trial.state != TrialState.WAITING
    ]
    told_points = [space.encode(parameters_of(trial, unused=unused)) for trial in told]
    kept = [i for i, point in enumerate(told_points) if len(space) and not np.isnan(point).all()]
    rows = [told[i] for i in kept]
    n, m = len(rows), len(directions)
    sign = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions])
    scores = np.full((n, m), math.nan)
    for i, trial in enumerate(rows):
        if trial.state == TrialState.COMPLETE and trial.values is not None:
            scores[i] = sign * np.array(trial.values, dtype=float)
    _estimate_pruned(rows, sign, scores)
    constraints = _constraints(rows)
    has_score = ~np.isnan(scores).any(axis=1)
    state = [trial.state for trial in rows]
    return History(
        numbers=np.array([trial.number for trial in rows], dtype=int),
        points=np.array([told_points[i] for i in kept]).reshape(n, len(space)),
        asked=np.array(
            [[name in trial.params for name in space.names] for trial in rows], dtype=bool
        ).reshape(n, len(space)),
        scores=scores,
        failed=np.array([s.is_finished() for s in state], dtype=bool) & ~has_score,
        running=np.array([s == TrialState.RUNNING for s in state], dtype=bool),
        pruned=np.array([s == TrialState.PRUNED for s in state], dtype=bool),
        violation=np.nansum(np.maximum(constraints, 0.0), axis=1),
        constraints=constraints,
    )


def _constraints(rows: Sequence[FrozenTrial]) -> np.ndarray:
    told = [trial.constraints for trial in rows]
    keys = sorted({key for constraints in told for key in constraints})
    values = [[constraints.get(key, math.nan) for key in keys] for constraints in told]
    return np.array(values, dtype=float).reshape(len(rows), len(keys))


def _estimate_pruned(rows: Sequence[FrozenTrial], sign: np.ndarray, scores: np.ndarray) -> None:
    """Fill in the final scores of pruned trials, objective by objective.

    A pruned trial is compared with the completed ones at its own last step: it gets the final
    score that stands at the same quantile; with one objective at most the median, since it was
    judged not worth finishing. With nothing to compare with at that step, its last report is
    taken as it is, at most the best completed score. Without any report it stays unknown (and
    counts as failed).
    """
    complete = [i for i, trial in enumerate(rows) if trial.state == TrialState.COMPLETE]
    highest = 0.5 if len(sign) == 1 else 1.0
    reports = [_reports(trial, len(sign)) for trial in rows]
    for i, trial in enumerate(rows):
        if trial.state != TrialState.PRUNED or not reports[i]:
            continue
        step = max(reports[i])
        for k, value in enumerate(sign * np.array(reports[i][step], dtype=float)):
            if math.isnan(value):
                continue
            finals = scores[complete, k]
            at_step = np.array(
                [
                    sign[k] * reports[j][step][k] if step in reports[j] else math.nan
                    for j in complete
                ],
                dtype=float,
            )
            known = ~np.isnan(at_step)
            if known.sum() >= 2:
                quantile = float(np.mean(at_step[known] <= value))
                scores[i, k] = np.quantile(finals[known], min(quantile, highest))
            elif len(complete):
                scores[i, k] = min(value, float(finals.max()))
            else:
                scores[i, k] = value


def _reports(trial: FrozenTrial, n_objectives: int) -> dict[int, Sequence[float]]:
    """What a trial reported, by step; with several objectives through ``pruners.report``."""
    if n_objectives == 1:
        return {step: (value,) for step, value in trial.intermediate_values.items()}
    return {
        int(key.removeprefix(REPORTED)): values
        for key, values in trial.system_attrs.items()
        if key.startswith(REPORTED)
    }
