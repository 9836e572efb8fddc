"""A measured table as a problem for any Optuna sampler, in the shape of OptunaHub's BaseProblem.

    import optuna

    problem = TableProblem("tiny/cipher-ample", tuned=["learning_rate", "lora_rank"])
    study = optuna.create_study(directions=problem.directions)
    study.optimize(problem, n_trials=20)
    print(problem.regret(study.best_value))

An evaluation asks the fitted surface and takes well below a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cache
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import surfaces

if TYPE_CHECKING:
    from torch import Tensor

    from optuna_lora_rl.learning.tables.surfaces import Surfaces

DEFAULTS: dict[str, Any] = {
    "lora_rank": 8,
    "alpha_ratio": 2.0,
    "learning_rate": 2e-4,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "layers": "all",
    "batch_size": 8,
    "max_steps": 32,
    "weight_decay": 0.0,
}
"""What a parameter is where it is not tuned: the vocabulary's defaults, at 32 steps."""

_WHOLE = ("lora_rank", "batch_size", "max_steps")
_SEARCH_POINTS, _SEARCH_ROUNDS = 2048, 8
_FRONT_ROUNDS, _FRONT_BORN = 40, 512


@cache
def _shipped() -> Surfaces:
    return surfaces.load()


class TableProblem:
    """Tune LoRA on a measured task: ``score = quality - cost_weight * cost``, to be maximised.

    Args:
        task: Name of the table, such as ``tiny/dates-small``; ``tables.TASKS`` has them.
        tuned: Names of the tuned parameters; all nine of ``design.SPACE`` if left out.
        fixed: Values of parameters that are not tuned, where they differ from ``DEFAULTS``.
        ranges: Narrower (low, high) of ordered parameters, or the choices of an unordered one.
        shift: Factors by which the problem's values of a parameter on a logarithmic scale exceed
            the measured ones. ``{"learning_rate": 0.01}`` is a model whose best learning rates
            are a hundredth of the measured ones; ranges and fixed values are the problem's.
        cost_weight: What the cost of the reference run (the defaults) is worth in quality.
        noise: Whether evaluations scatter as the table's repeated runs do.
        failures: Whether a run that diverges gives NaN, which Optuna counts as failed; else
            it gets the score that it has.
        reports: Whether a trial is told the curve at 25, 50 and 75% of its steps, and pruned
            where its pruner says so.
        seed: Of the noise.
        shipped: Surfaces of one's own instead of the shipped ones.

    Raises:
        UserError: A name or a value is none that the tables hold.
    """

    def __init__(
        self,
        task: str,
        *,
        tuned: Sequence[str] | None = None,
        fixed: Mapping[str, Any] | None = None,
        ranges: Mapping[str, Sequence[Any]] | None = None,
        shift: Mapping[str, float] | None = None,
        cost_weight: float = 0.1,
        noise: bool = False,
        failures: bool = False,
        reports: bool = False,
        seed: int = 0,
        shipped: Surfaces | None = None,
    ) -> None:
        self.task = design.chosen([task])[0]
        self.cost_weight, self.failures, self.reports = cost_weight, failures, reports
        names = list(design.SPACE) if tuned is None else list(tuned)
        self._shift = dict(shift or {})
        for said in (names, fixed or {}, ranges or {}, self._shift):
            _check_names(said)
        for name in [*(fixed or {}), *(ranges or {})]:
            if (name in names) is (name in (fixed or {})):
                raise UserError(
                    f"{name} is tuned and cannot be fixed as well."
                    if name in names
                    else f"{name} is not tuned and has no range; fix its value."
                )
        for name in self._shift:
            if name not in ("alpha_ratio", "learning_rate"):
                raise UserError(
                    f"shift.{name}: only alpha_ratio and learning_rate can be shifted."
                )
        self._fixed = {
            **{name: self._problems(name, DEFAULTS[name]) for name in DEFAULTS},
            **dict(fixed or {}),
        }
        known = shipped or _shipped()
        if self.task not in known.names:
            raise UserError(f"The table of {self.task} has not been measured yet.")
        self._surface = known[[known.names.index(self.task)]]
        self._noise = float(self._surface.noise[0]) if noise else 0.0
        self._generator = np.random.default_rng(seed)
        self._space = {name: self._distribution(name, ranges or {}) for name in names}
        # What cannot be evaluated shall show before the first trial.
        self._points([{name: value for name, value in self._fixed.items() if name not in names}])

    @property
    def directions(self) -> list[StudyDirection]:
        """One direction: the score is maximised."""
        return [StudyDirection.MAXIMIZE]

    @property
    def search_space(self) -> dict[str, BaseDistribution]:
        """The tuned parameters."""
        return dict(self._space)

    def __call__(self, trial: optuna.Trial) -> float:
        """Evaluate a trial's suggestions."""
        params = {name: _suggest(trial, name, one) for name, one in self._space.items()}
        if self.reports:
            self._report(trial, params)
        return self.evaluate(params)

    def evaluate(self, params: Mapping[str, Any]) -> float:
        """Return the score of one configuration; NaN where it diverges and ``failures`` is on."""
        x = self._points([params])
        if self.failures and bool(self._surface.diverges(x)[0, 0]):
            return math.nan
        scatter = self._noise * float(self._generator.standard_normal()) if self._noise else 0.0
        return float(self._scores(x)[0]) + scatter

    def regret(self, score: float) -> float:
        """Return the normalised regret: 0 for the best known score, 1 for the median one."""
        return (self.best - score) / (self.best - self.median)

    def outcomes(
        self, configurations: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise-free quality, cost and divergence of N configurations, each of shape (N,)."""
        x, of = self._points(configurations), self._surface
        return of.quality(x)[0], of.cost(x)[0], of.diverges(x)[0]

    @property
    def best(self) -> float:
        """The best noise-free score that a long search found."""
        return self._extremes[0]

    @property
    def median(self) -> float:
        """The median noise-free score of uniform configurations."""
        return self._extremes[1]

    @cached_property
    def best_params(self) -> dict[str, Any]:
        """The configuration with the best known score."""
        return self._searched[0]

    @cached_property
    def front(self) -> np.ndarray:
        """Cost and quality, shape (n, 2), of the best trade-offs that a long search found.

        By cost; no noise, and none that diverges where ``failures`` is on.
        """
        sampler = np.random.default_rng(0)
        drawn: list[Mapping[str, Any]] = [self._draw(sampler) for _ in range(_SEARCH_POINTS)]
        for _ in range(_FRONT_ROUNDS):
            top = self._trade_offs(drawn)[0]
            parents = [top[k % len(top)] for k in range(_FRONT_BORN)]
            scales = 0.3 * 10.0 ** -sampler.uniform(0.0, 2.0, _FRONT_BORN)
            born = map(self._mutate, parents, scales, repeat(sampler))
            drawn = [*top, *born]
        return self._trade_offs(drawn)[1]

    def _trade_offs(
        self, drawn: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], np.ndarray]:
        """Return those that no other one dominates, and their cost and quality."""
        quality, cost, diverged = self.outcomes(drawn)
        kept = torch.where(~(diverged & self.failures))[0]
        found = torch.stack([cost, quality], 1)[kept].numpy()
        best = undominated(found * [1.0, -1.0])
        return [drawn[place] for place in kept[best].tolist()], found[best]

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        return self._searched[1:]

    @cached_property
    def _searched(self) -> tuple[dict[str, Any], float, float]:
        sampler = np.random.default_rng(0)
        drawn = [self._draw(sampler) for _ in range(_SEARCH_POINTS)]
        scores = self._feasible_scores(drawn)
        median = float(scores[scores.isfinite()].median())
        for turn in range(_SEARCH_ROUNDS):
            top = [drawn[place] for place in scores.argsort(descending=True)[:24].tolist()]
            born = [self._mutate(one, 0.3 * 0.6**turn, sampler) for one in top for _ in range(12)]
            drawn = top + born
            scores = self._feasible_scores(drawn)
        place = int(scores.argmax())
        return drawn[place], float(scores[place]), median

    def _feasible_scores(self, drawn: Sequence[Mapping[str, Any]]) -> Tensor:
        x = self._points(drawn)
        scores = self._scores(x)
        return scores.masked_fill(self._surface.diverges(x)[0] & self.failures, -math.inf)

    def _draw(self, generator: np.random.Generator) -> dict[str, Any]:
        return {name: _at(one, generator.random()) for name, one in self._space.items()}

    def _mutate(
        self, params: Mapping[str, Any], scale: float, generator: np.random.Generator
    ) -> dict[str, Any]:
        moved = {}
        for name, one in self._space.items():
            share = generator.random()
            if not isinstance(one, CategoricalDistribution):
                share = _share(one, params[name]) + scale * generator.standard_normal()
            moved[name] = _at(one, share) if generator.random() < 0.4 else params[name]
        return moved

    def _scores(self, x: Tensor) -> Tensor:
        return (self._surface.quality(x) - self.cost_weight * self._surface.cost(x))[0]

    def _points(self, drawn: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the coordinates of configurations in the problem's values, shape (1, N, D)."""
        rows = []
        for params in drawn:
            whole = {**self._fixed, **params}
            rows.append(
                [
                    coordinates.coordinate(name, self._measured(name, whole[name]))
                    for name in coordinates.NAMES
                ]
            )
        return torch.tensor([rows], dtype=torch.float64)

    def _measured(self, name: str, value: Any) -> Any:
        return value / self._shift[name] if name in self._shift else value

    def _problems(self, name: str, value: Any) -> Any:
        return value * self._shift[name] if name in self._shift else value

    def _distribution(self, name: str, ranges: Mapping[str, Sequence[Any]]) -> BaseDistribution:
        one = design.SPACE[name]
        if isinstance(one, design.Level) and isinstance(one.values[0], str):
            choices = tuple(ranges.get(name, one.values))
            for choice in choices:
                coordinates.coordinate(name, choice)
            return CategoricalDistribution(choices)
        said = tuple(ranges.get(name, ()))
        if said and (len(said) != 2 or not said[0] < said[1]):
            raise UserError(f"ranges.{name} is {list(said)}; give a smallest and a largest value.")
        low, high = said or (self._problems(name, end) for end in coordinates.bounds(name))
        for end in (low, high):
            coordinates.coordinate(name, self._measured(name, end))
        log = name in coordinates.LOGARITHMIC
        if name in _WHOLE:
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(float(low), float(high), log=log)

    def _report(self, trial: optuna.Trial, params: Mapping[str, Any]) -> None:
        x = self._points([params])
        curve = self._surface.curve(x)[0, 0].tolist()
        charge = self.cost_weight * float(self._surface.cost(x)[0, 0])
        steps = int({**self._fixed, **params}["max_steps"])
        for share, quality in zip((0.25, 0.5, 0.75), curve[:-1], strict=True):
            trial.report(quality - charge, max(1, round(share * steps)))
            if trial.should_prune():
                raise optuna.TrialPruned


def undominated(losses: np.ndarray) -> np.ndarray:
    """Places of the rows of losses (n, 2) than which no other is as low in both, by the first."""
    order = np.lexsort(losses.T[::-1])
    second = losses[order, 1]
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], second[:-1]]))
    return order[second < lowest]


def _check_names(names: Any) -> None:
    for name in names:
        if name not in design.SPACE:
            raise UserError(
                f"There is no parameter {name!r}; there are: {', '.join(design.SPACE)}."
            )


def _suggest(trial: optuna.Trial, name: str, one: BaseDistribution) -> Any:
    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(name, one.choices)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(name, one.low, one.high, log=one.log)
    assert isinstance(one, FloatDistribution)
    return trial.suggest_float(name, one.low, one.high, log=one.log)


def _at(one: BaseDistribution, share: float) -> Any:
    """Return the value at a place of a distribution's range, as uniform sampling has it."""
    share = min(max(share, 0.0), 1.0)
    if isinstance(one, CategoricalDistribution):
        return one.choices[min(int(share * len(one.choices)), len(one.choices) - 1)]
    assert isinstance(one, FloatDistribution | IntDistribution)
    half = 0.5 if isinstance(one, IntDistribution) else 0.0
    low, high = one.low - half, one.high + half
    value = low * (high / low) ** share if one.log else low + share * (high - low)
    if half:
        return min(max(round(value), int(one.low)), int(one.high))
    return min(max(value, one.low), one.high)


def _share(one: BaseDistribution, value: Any) -> float:
    assert isinstance(one, FloatDistribution | IntDistribution)
    if one.high <= one.low:
        return 0.5
    if one.log:
        return math.log(value / one.low) / math.log(one.high / one.low)
    return (float(value) - one.low) / (one.high - one.low)
