"""Response surfaces from finished studies, to cut training tasks out of.

Notations
    n, P      trials of a study and its parameters
    natural   values of the parameters, shape (N, P): logarithms undone, choices without order by
              their index
    u         the same in the unit cube, shape (N, P)

A study's trials cover its space unevenly and with noise. What they say is a Gaussian process over
the space: its posterior mean is one surface, and the means of processes conditioned on random
subsets of the trials with fresh noise are others that the same trials could have come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.matching import place
from optuna_lora_rl.policy.scores import scalarise
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.policy.transfer import SourceStudy

MIN_TRIALS = 8
_KEPT_SHARE = 0.8
# Noise of a trial that failed, as in the policy's own surrogate.
_FAILURE_NOISE = 0.05


@dataclass(frozen=True, eq=False)
class StudySurface:
    """What a study says about any configuration in its ranges (a ``ResponseSurface``).

    Args:
        name: of the study.
        dimensions: its parameters, with roles.
        noise: deviation of a run, in the units of the value.
        layout: of its space.
        score: the process of the scores.
        failure: the process of failing (1) or not (-1); ``None`` where nothing failed.
    """

    name: str
    dimensions: tuple[Dimension, ...]
    noise: float
    layout: Layout
    score: Process
    failure: Process | None

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value (larger is better) and failure of natural values x (N, P), each (N,)."""
        u = np.stack([_unit(d, x[:, j]) for j, d in enumerate(self.dimensions)], 1)
        z = self.layout.points(u).coordinates
        value = self.score.posterior(z)[0]
        if self.failure is None:
            return value, np.zeros(len(x), dtype=bool)
        return value, self.failure.posterior(z)[0] > 0

    def cost(self, x: np.ndarray) -> np.ndarray:
        """The same for all, shape (N,): a study's scores hold what its owner counts."""
        return np.ones(len(x))


def surfaces_of(study: SourceStudy, count: int, seed: int) -> list[StudySurface]:
    """Surfaces that a study's trials may have come from; the first is the most likely one.

    Args:
        study: with parameters of known roles.
        count: how many.
        seed: of subsets and noise.

    Raises:
        UserError: too few trials, or nothing that looks like LoRA.
    """
    good = ~study.bad & ~np.isnan(study.scores).any(axis=1)
    if good.sum() < MIN_TRIALS:
        raise UserError(
            f"{study.name} has {int(good.sum())} trials with a result, but at least {MIN_TRIALS} "
            "are needed to learn a policy from it"
        )
    space = make_space([_plain(dimension) for dimension in study.space.dimensions])
    if not space.is_lora:
        raise UserError(
            f"{study.name} tunes {', '.join(space.names)}, which does not look like LoRA; outside "
            "LoRA the policy has nothing to learn"
        )
    return _draws(study, space, good, count, np.random.default_rng(seed))


def _draws(
    study: SourceStudy, space: Space, good: np.ndarray, count: int, rng: np.random.Generator
) -> list[StudySurface]:
    layout, (points, _) = Layout(space), place(space, study.space, study.params)
    z = layout.points(np.where(np.isnan(points), layout.default, points)).coordinates
    y, extra = standardise(_scores(study, good), ~good), np.where(good, 0.0, _FAILURE_NOISE)

    def process(y: np.ndarray, noise: np.ndarray) -> Process:
        theta = fit_theta(z, y, layout.unordered, layout.log_l, noise, iterations=40, fit_rows=200)
        return Process(z, y, layout.unordered, theta, noise)

    score = process(y, extra)
    failure = None if good.all() else process(np.where(good, -1.0, 1.0), np.zeros(len(y)))
    noise = float(np.exp(0.5 * score.theta[-1]))
    surface = StudySurface(study.name, space.dimensions, noise, layout, score, failure)
    surfaces = [surface]
    for _ in range(count - 1):
        kept = rng.random(len(good)) < _KEPT_SHARE
        again = y + noise * rng.normal(size=y.shape)
        drawn = Process(z[kept], again[kept], layout.unordered, score.theta, extra[kept])
        surfaces.append(replace(surface, score=drawn))
    return surfaces


def _scores(study: SourceStudy, good: np.ndarray) -> np.ndarray:
    """One score a trial, objectives weighed evenly; 0 where there is none."""
    scores, m = np.zeros(len(good)), study.scores.shape[1]
    chosen: Sequence[float] | np.ndarray = study.scores[good, 0]
    if m > 1:
        chosen = scalarise(study.scores[good], np.full(m, 1.0 / m))
    scores[good] = chosen
    return scores


def _plain(dimension: Dimension) -> Dimension:
    """Choices that are numbers as the range that they span."""
    if dimension.kind != "categorical" or not dimension.is_ordered or len(dimension.choices) < 2:
        return dimension
    levels = [float(level) for level in dimension.levels]  # type: ignore[arg-type]
    kind = "int" if all(level == int(level) for level in levels) else "float"
    return Dimension(
        dimension.name, kind, levels[0], levels[-1], log=levels[0] > 0, role=dimension.role
    )


def _unit(dimension: Dimension, values: np.ndarray) -> np.ndarray:
    """Unit coordinates of natural values of one parameter, shape (N,)."""
    if not dimension.is_ordered:
        return (values + 0.5) / len(dimension.levels)
    low, high = dimension.natural(np.array([0.0, 1.0]))
    if dimension.log:
        low, high, values = np.log(low), np.log(high), np.log(np.maximum(values, 1e-300))
    return np.asarray(((values - low) / max(high - low, 1e-300)).clip(0.0, 1.0))
