"""What a study has taught about each parameter, and where each trial's proposal came from.

Works for any Optuna study, whoever proposed its trials: the surrogate of :class:`RLSampler` is
fitted to them anew. As there, what scores far worse than the rest is drawn in, so that the scale
is set by the configurations worth telling apart.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.importance import get_param_importances
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.scaling import reasons
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.samplers import CONTEXT_KEY
from optuna_lora_rl.samplers import proposal
from optuna_lora_rl.samplers.cut_short import with_evidence
from optuna_lora_rl.samplers.history import History
from optuna_lora_rl.samplers.history import read_history
from optuna_lora_rl.samplers.history import reports_of
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.rl import on_cpu

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.policy.dimensions import Dimension
    from optuna_lora_rl.policy.dimensions import Space

_FEWEST = 3
_MOST_ROWS = 300
_GRID = 49
# Deviations of a prediction from which little is known; 1 before any result.
_UNKNOWN = 0.8
_FAILURE_NOISE = 0.05
# Share of the bank of response surfaces that is worth a word.
_HEARD = 0.05
# Deviations on either side of the mean that hold 90% of a normal density.
_BAND = 1.6449

_ORIGINS = {
    "default": "the guides' configuration",
    "sweep": "a step of a learning-rate sweep, at the guides' values or at a small or large run's",
    "prior": "a draw from what is usual in LoRA runs",
    "uniform": "a place that is far from the trials so far",
    "axis": "one of the best trials, moved along one parameter",
    "mutation": "a change of one of the best trials",
    "improvement": "the most promising place by the surrogate",
    "transfer": "what was best in an earlier study",
    "random": "a random draw, before any result",
    "thompson": "a draw of the bandit from what each level may be worth",
    "ucb": "the bandit's highest upper bound",
    "enqueued": "enqueued by hand",
}


@dataclass(frozen=True)
class Parameter:
    """What is believed of one parameter, the others at the best trial's values.

    Args:
        name: in the study.
        role: what it was recognised as in a LoRA run, or None.
        log: whether its range is logarithmic.
        values: places along its range, ascending; or its choices.
        mean: predicted value of the objective there, shape (len(values),).
        low: the lower end of the 90% band of the mean.
        high: its upper end.
        prior: what is usual in LoRA runs, as a density whose largest value is 1; None where
            nothing is known.
        importance: by PED-ANOVA (Watanabe et al. 2023), how much its values tell the better
            completed trials from the others, as optuna-dashboard shows it; shares sum to 1, and
            a parameter that some completed trials lack has none.
        best: its value in the best trial.
        trials: pairs (value, objective) of the completed trials.
        pruned: pairs (value, last report) of the pruned trials.
    """

    name: str
    role: str | None
    log: bool
    values: tuple[Any, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    prior: np.ndarray | None
    importance: float
    best: Any
    trials: tuple[tuple[Any, float], ...]
    pruned: tuple[tuple[Any, float], ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where a trial's configuration came from, and why.

    Args:
        source: in words.
        expected: mean and deviation of the score that was predicted, in deviations from the
            average of the trials before it; None where nothing was.
        remarks: what else is worth knowing.
    """

    source: str
    expected: tuple[float, float] | None = None
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        remarks = f" ({', '.join(self.remarks)})" if self.remarks else ""
        if self.expected is None:
            return self.source + remarks
        mean, deviation = self.expected
        expected = f"expected {mean:+.1f} ± {deviation:.1f} deviations from the average"
        return f"{self.source}; {expected}{remarks}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """See :func:`explain`.

    Args:
        parameters: the most important first; empty with fewer than three results.
        noise: deviation of a run round its configuration's value, as the surrogate sees it, in
            the objective's units.
        origins: where each trial came from and why, by its number.
        reasons: what was expected before the first trial, and from what, in sentences.
    """

    parameters: tuple[Parameter, ...]
    noise: float
    origins: Mapping[int, Origin]
    reasons: tuple[str, ...] = ()

    def figure(self) -> go.Figure:
        """Mean and band along each parameter, with the trials and the prior, for plotly."""
        from optuna_lora_rl.samplers.explanation_figure import draw

        return draw(self)

    def __str__(self) -> str:
        lines = [
            f"{p.name}: importance {p.importance:.0%}, best {_short(p.best)}"
            for p in self.parameters
        ]
        return "\n".join(
            [*self.reasons, *lines, *(f"trial {n}: {said}" for n, said in self.origins.items())]
        )

    def __repr__(self) -> str:
        # The arrays of a curve are for figures.
        return str(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the parameters, and where each trial came from."""
        parameters = [(p.name, f"{p.importance:.0%}", _short(p.best)) for p in self.parameters]
        heads = ("parameter", "importance (PED-ANOVA)", "best so far")
        origins = [(str(number), str(said)) for number, said in self.origins.items()]
        return (
            "".join(f"<p>{html.escape(reason)}</p>" for reason in self.reasons)
            + _html_table(heads, parameters)
            + "<p>figure() draws the predicted objective along each parameter.</p>"
            + f"<details><summary>Where each of the {len(origins)} trials came from</summary>"
            + _html_table(("trial", "why it was proposed"), origins)
            + "</details>"
        )


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def explain(
    study: Study, *, objective: int = 0, roles: Mapping[str, str] | None = None
) -> Explanation:
    """Fit the surrogate to a study, and read off what it believes.

    >>> import optuna
    >>> import optuna_lora_rl
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(sampler=optuna_lora_rl.RLSampler(seed=0))
    >>> study.optimize(lambda t: (t.suggest_float("x", 0, 1) - 0.2) ** 2, n_trials=8)
    >>> found = optuna_lora_rl.explain(study)
    >>> found.parameters[0].name, round(found.parameters[0].importance, 1)
    ('x', 1.0)

    Args:
        study: any study.
        objective: which, of several.
        roles: what parameters are, where their names are not the usual ones.

    Raises:
        UserError: there is no such objective.
    """
    if not 0 <= objective < len(study.directions):
        raise UserError(
            f"objective is {objective!r}, but must be between 0 and {len(study.directions) - 1}"
        )
    trials = study.get_trials(deepcopy=False)
    distributions: dict[str, BaseDistribution] = {}
    for trial in with_evidence(trials):
        distributions.update(trial.distributions)
    said = study.user_attrs.get(CONTEXT_KEY)
    tuning = None if said is None else TuningContext.from_dict(said)
    tuned = {n: d for n, d in distributions.items() if not d.single()}
    space = space_of(tuned, roles, said=tuning is not None)
    layout = Layout(space, tuning)
    why = tuple(reasons(tuning, layout.expected, layout.rows)) if tuning else ()
    origins = {trial.number: origin(trial) for trial in trials}
    history = read_history(trials, space, study.directions)
    # An infinite value has no place in the objective's units.
    history = history.select(~np.isinf(history.scores[:, objective]))
    if history.scored.sum() < _FEWEST:
        return Explanation((), math.nan, origins, why)
    shares = _importances(study, objective)
    last = {t.number: _last_report(t, objective, len(study.directions)) for t in trials}
    with on_cpu(), np.errstate(all="ignore"):
        model = _Model.of(space, layout, history, objective, study.directions[objective], last)
        parameters = [
            model.parameter(column, shares.get(name, 0.0))
            for column, name in enumerate(space.names)
        ]
        noise = model.noise
    parameters.sort(key=lambda p: -p.importance)
    return Explanation(tuple(parameters), noise, origins, why)


def _importances(study: Study, objective: int) -> dict[str, float]:
    """The importances that optuna-dashboard shows; empty where no trial is better than others."""
    sign = -1.0 if study.directions[objective] == StudyDirection.MAXIMIZE else 1.0
    told = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len({trial.values[objective] for trial in told}) < 2:
        return {}
    with warnings.catch_warnings():
        # It is told which values are good by the sign.
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
        warnings.simplefilter("ignore", ExperimentalWarning)
        return get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(),
            target=lambda trial: sign * trial.values[objective],
        )


def _last_report(trial: FrozenTrial, objective: int, n_objectives: int) -> float:
    reports = reports_of(trial, n_objectives)
    return float(reports[max(reports)][objective]) if reports else math.nan


def origin(trial: FrozenTrial) -> Origin:
    """Where a trial's configuration came from, as far as its sampler kept it."""
    found = proposal(trial)
    if "fixed_params" in trial.system_attrs and (found is None or "mean" not in found):
        return Origin(_ORIGINS["enqueued"])
    if found is None:
        return Origin("proposed by another sampler")
    source = str(found.get("source"))
    said = _ORIGINS.get(source, source)
    if "std" not in found:
        return Origin(said)
    remarks = []
    if found["std"] > _UNKNOWN:
        remarks.append("little is known there")
    if (likely := math.exp(found.get("log_feasible", 0.0))) < 0.8:
        remarks.append(f"{likely:.0%} likely to work")
    if found.get("surfaces", 0.0) >= _HEARD:
        remarks.append(f"{found['surfaces']:.0%} by what LoRA runs usually respond to")
    if abs(found.get("network", 0.0)) >= 0.1:
        remarks.append(f"the network gave {found['network']:+.1f}")
    return Origin(said, (found["mean"], found["std"]), tuple(remarks))


@dataclass(frozen=True)
class _Model:
    """The surrogate of one objective and how to read it in the objective's units."""

    space: Space
    layout: Layout
    process: Process
    points: np.ndarray
    values: np.ndarray
    pruned: np.ndarray
    best: np.ndarray
    offset: float
    unit: float

    @classmethod
    def of(
        cls,
        space: Space,
        layout: Layout,
        history: History,
        objective: int,
        direction: StudyDirection,
        last: Mapping[int, float],
    ) -> _Model:
        finished = np.flatnonzero(~history.running)[-_MOST_ROWS:]
        points = np.where(np.isnan(history.points), layout.default, history.points)
        good = history.scored[finished]
        scores = np.where(good, history.scores[finished, objective], 0.0)
        y = standardise(scores, ~good)
        X, noise = layout.points(points[finished]).coordinates, np.where(good, 0.0, _FAILURE_NOISE)
        theta = fit_theta(X, y, layout.unordered, layout.log_l, noise, iterations=40, fit_rows=100)
        sign = 1.0 if direction == StudyDirection.MAXIMIZE else -1.0
        kept = finished[good]
        # As Optuna's best trial: of those that keep the constraints, where any does.
        allowed = history.violation[kept] <= 0
        eligible = np.where(allowed | ~allowed.any(), scores[good], -np.inf)
        top = kept[int(np.argmax(eligible))]
        offset, unit = _scale(scores[good], y[good])
        return cls(
            space=space,
            layout=layout,
            process=Process(X, y, layout.unordered, theta, noise),
            points=history.points[kept],
            # A pruned trial's estimated end is what the surrogate learns from, and no result.
            values=np.where(
                history.pruned[kept],
                [last[number] for number in history.numbers[kept].tolist()],
                sign * scores[good],
            ),
            pruned=history.pruned[kept],
            best=points[top],
            offset=sign * offset,
            unit=sign * unit,
        )

    @property
    def noise(self) -> float:
        return abs(self.unit) * math.exp(0.5 * self.process.theta[-1])

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation in the objective's units at points (N, D)."""
        mean, deviation = self.process.posterior(self.layout.points(x).coordinates)
        return self.offset + self.unit * mean, abs(self.unit) * deviation

    def parameter(self, column: int, importance: float) -> Parameter:
        dimension = self.space.dimensions[column]
        u = dimension.grid(_GRID) if dimension.n_levels else np.linspace(0.0, 1.0, _GRID)
        x = np.repeat(self.best[None], len(u), axis=0)
        x[:, column] = u
        mean, deviation = self.posterior(x)
        known = ~np.isnan(self.points[:, column]) & np.isfinite(self.values)

        def seen(rows: np.ndarray) -> tuple[tuple[Any, float], ...]:
            places, values = self.points[rows, column], self.values[rows]
            return tuple(
                (dimension.decode(place), float(value))
                for place, value in zip(places, values, strict=True)
            )

        return Parameter(
            name=dimension.name,
            role=dimension.role,
            log=dimension.log,
            values=tuple(dimension.decode(place) for place in u),
            mean=mean,
            low=mean - _BAND * deviation,
            high=mean + _BAND * deviation,
            prior=self._prior(dimension, column, u),
            importance=importance,
            best=dimension.decode(self.best[column]),
            trials=seen(known & ~self.pruned),
            pruned=seen(known & self.pruned),
        )

    def _prior(self, dimension: Dimension, column: int, u: np.ndarray) -> np.ndarray | None:
        if dimension.role is None or not self.layout.is_lora:
            return None
        table = np.exp(self.layout.log_density[column])
        density = np.interp(u, np.linspace(0.0, 1.0, len(table)), table)
        return np.asarray(density / density.max())


def _scale(scores: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """What a standardised 0 and 1 are in scores; the better half is not drawn in."""
    order = np.argsort(scores)
    middle, top = order[len(order) // 2], order[-1]
    if y[top] - y[middle] < 1e-9:
        middle = order[0]
    difference = float(y[top] - y[middle])
    unit = float(scores[top] - scores[middle]) / difference if difference > 1e-9 else 0.0
    return float(scores[top]) - unit * float(y[top]), unit
