"""Fit the tables with scale in them, and say how the best learning rate moves.

Notations
    T, B    tables, regressors
    x       values of the regressors at the middle of a table's own steps and batch sizes, (B,)
    beta    coefficients, in decades of the best rate, (B,)
    theta   the parameters of one table's form
    r, J    residuals of one table, of its runs and of the prior, and their derivatives by theta
    G       derivatives of the residuals by beta

Each table is fitted with ``scaled_surfaces.Plateau``, under a prior on theta. Its
best rate is ``x @ beta + u``, where u is a table's own and normal; the exponents of steps and of
batch size within a table are those of the regression, but for a small deviation. So what many
tables say together, within and between them, decides about beta, and beta helps where a table has
few runs. Beta is found by Gauss-Newton steps on all tables, from which every theta is eliminated
(Schur complement), the deviation of u by moments. Rates are those of alpha = 2 rank, rank 16 and
all linear modules.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from optuna_lora_rl.learning.scaled_surfaces import Plateau
from optuna_lora_rl.learning.scaled_surfaces import correlation
from optuna_lora_rl.learning.scaled_surfaces import natural
from optuna_lora_rl.learning.scaled_surfaces import quality
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.scaled import ScaledTask
from optuna_lora_rl.tiny.tasks import TRAINING_SIZES
from studies.tiny.pretraining import RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping
    from collections.abc import Sequence
    from pathlib import Path

    from optuna_lora_rl.learning.tables.dataset import Table

FEWEST = 4
"""Runs below which a table is not fitted."""
ROUNDS = 6

# Mean, deviation and bounds of each parameter of a form, from fits of the 26 other tables.
PRIOR = {
    "half": (0.45, 0.2, 0.05, 2.0),
    "widens": (0.45, 0.15, -0.5, 1.0),
    "rising": (0.28, 0.08, 0.05, 1.0),
    "falling": (0.15, 0.1, 0.03, 1.0),
    "drop": (0.45, 0.4, 0.0, 3.0),
    "by_ratio": (0.64, 0.12, 0.0, 1.3),
    "by_rank": (0.58, 0.15, -0.3, 1.3),
    "by_size": (0.55, 0.15, -0.5, 1.3),
    "top": (0.6, 0.4, 0.0, 1.2),
    "lack": (0.08, 0.1, 0.0, 1.0),
    "scale": (2.0, 1.0, 0.5, 6.0),
    "large": (0.01, 0.015, -0.2, 0.1),
    "steps": (0.03, 0.04, -0.1, 0.4),
    "batch": (0.03, 0.04, -0.1, 0.3),
    "dropout": (0.0, 0.03, -0.2, 0.2),
}
# Deviations of a table's own exponents from those of the regression.
EXPONENTS = {"by_steps": (0.0, 0.15, -1.0, 1.0), "by_batch": (0.0, 0.15, -1.0, 1.0)}
# The middle of the steps of the tables that the prior is from.
_USUAL_STEPS = 23
# Deviation of a run from its form, in quality.
_FORM_ERROR = 0.05

REGRESSORS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "one": lambda known: 1.0,
    "width": lambda known: math.log10(known["hidden_size"] / 128),
    "depth": lambda known: math.log10(known["model_layers"] / 4),
    "steps": lambda known: math.log10(known["steps"] / 48),
    "steps beyond 64": lambda known: max(0.0, math.log10(known["steps"] / 64)),
    "batch": lambda known: math.log10(known["batch_size"] / 8),
    "examples": lambda known: math.log10(known["examples"] / 256),
}
"""What the best rate is regressed on: decades from a run of 48 steps of 8 rows out of 256
examples, of a model 128 wide with 4 layers."""


NAMES = tuple(REGRESSORS)
_START = np.array([-2.6, -0.3, 0.0, -0.4, 0.0, 0.0, 0.0])
# Coefficients are small numbers, unless the tables say otherwise.
_USUAL = 1.0


@dataclass(frozen=True)
class Fit:
    """A fitted table.

    Attributes:
        table: Its runs.
        known: Its context, with ``steps`` and ``batch_size`` in the middle of the table's.
        form: The form.
        theta: What was fitted: u, the deviations of the exponents, and the form's other numbers.
        rate: log10 of the best rate at ``known``.
        deviation: Of ``rate``, from the curvature of the fit, with the regression held.
        r2: Share of the variance of the runs that the form explains.
        curvature: What the table says of beta, shape (B, B).
        gradient: In which direction it pulls beta, shape (B,).
    """

    table: Table
    known: dict[str, Any]
    form: Plateau
    theta: np.ndarray
    rate: float
    deviation: float
    r2: float
    curvature: np.ndarray
    gradient: np.ndarray


def others() -> list[Table]:
    """Return the 26 tables of one design with their contexts, as if they were of these."""
    return [replace(table, task=_task(table)) for table in dataset.load()]


def _task(table: Table) -> ScaledTask:
    recipe = RECIPES[table.task.model]
    context = {
        "hidden_size": recipe.width,
        "model_layers": recipe.layers,
        # The embedding, which is the head too, and the linear modules of each layer.
        "model_parameters": 1024 * recipe.width
        + recipe.layers * (4 * recipe.width**2 + 3 * recipe.width * recipe.inner),
        "examples": TRAINING_SIZES[table.task.size],
        "method": "sft",
        "precision": "fp32",
    }
    return ScaledTask(f"{table.task.name}", table.task.split, context)


def known_of(table: Table) -> dict[str, Any]:
    """Return a table's context with the middle of its steps and batch sizes."""
    middle = {
        name: 2.0 ** float(np.mean(np.log2(np.unique(table.parameters[column]))))
        for name, column in (("steps", "max_steps"), ("batch_size", "batch_size"))
    }
    return {**table.task.context, **middle}


def regressors(known: Mapping[str, Any]) -> np.ndarray:
    """Return x of what is known."""
    return np.array([value(known) for value in REGRESSORS.values()])


def fit(table: Table, beta: np.ndarray, spread: float, start: np.ndarray | None = None) -> Fit:
    """Fit one table.

    Args:
        table: Its runs.
        beta: The regression's coefficients.
        spread: Deviation of a table's best rate from the regression.
        start: Theta to begin with; a few are tried if left out.
    """
    v, y, known = natural(table.parameters), quality(table), known_of(table)
    x, along = regressors(known), {name: _along(known, name) for name in ("steps", "batch_size")}
    priors = {"u": (0.0, spread, -3.0, 3.0), **EXPONENTS, **PRIOR}
    mean, deviation, low, high = np.array(list(priors.values())).T
    # A plateau is expected to be the wider the longer the runs, between tables as within them.
    wider = PRIOR["widens"][0] * math.log10(known["steps"] / _USUAL_STEPS)
    mean[3 + list(PRIOR).index("half")] += wider

    def form(theta: np.ndarray) -> Plateau:
        at = dict(zip(priors, theta.tolist(), strict=True))
        at["by_steps"] -= float(beta @ along["steps"])
        at["by_batch"] += float(beta @ along["batch_size"])
        return Plateau(
            rate=float(x @ beta) + at.pop("u"),
            middle_steps=math.log2(known["steps"]),
            middle_batch=math.log2(known["batch_size"]),
            **at,
        )

    def residuals(theta: np.ndarray) -> np.ndarray:
        # Divergence is far from any form; it counts for no more than a few deviations.
        apart = (form(theta)(v) - y) / _FORM_ERROR
        return np.concatenate([2 * np.arctan(apart / 2), (theta - mean) / deviation])

    best: Any = None
    for begin in [start] if start is not None else _starts(mean, y):
        inside = np.clip(begin, low + 1e-6, high - 1e-6)
        found = least_squares(
            residuals, inside, bounds=(low, high), diff_step=1e-4, max_nfev=80, x_scale=deviation
        )
        if best is None or found.cost < best.cost:
            best = found
    found_form, J, r = form(best.x), best.jac, best.fun
    inverse = np.linalg.pinv(J.T @ J)
    # Beta moves what theta's first three move, but costs nothing in the prior.
    runs = np.arange(len(r)) < len(y)
    G = np.where(runs, J[:, 0], 0.0)[:, None] * x
    G -= np.where(runs, J[:, 1], 0.0)[:, None] * along["steps"]
    G += np.where(runs, J[:, 2], 0.0)[:, None] * along["batch_size"]
    explained = J @ (inverse @ (J.T @ G))
    total = float(np.square(y - y.mean()).sum()) or 1.0
    return Fit(
        table=table,
        known=known,
        form=found_form,
        theta=best.x,
        rate=found_form.rate,
        deviation=float(np.sqrt(inverse[0, 0])),
        r2=1 - float(np.square(found_form(v) - y).sum()) / total,
        curvature=G.T @ (G - explained),
        gradient=-(G - explained).T @ r,
    )


def _along(known: dict[str, Any], name: str) -> np.ndarray:
    """How the regressors change by decade of the steps or of the batch size, shape (B,)."""
    sides = [regressors({**known, name: known[name] * 10.0**side}) for side in (-0.05, 0.05)]
    return (sides[1] - sides[0]) / 0.1


def _starts(mean: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    starts = []
    top = 3 + list(PRIOR).index("top")
    for off in (0.0, -0.6, 0.6):
        start = mean.copy()
        start[0], start[top] = off, np.quantile(y, 0.9)
        starts.append(start)
    return starts


@dataclass(frozen=True)
class Regression:
    """log10 of the best rate on what is known.

    Attributes:
        coefficients: Beta, in decades a decade; the first is the rate in the middle.
        intervals: 95% of the coefficients over resampled tables, shape (B, 2).
        spread: Deviation of a table's best rate from the regression.
    """

    coefficients: np.ndarray
    intervals: np.ndarray
    spread: float

    def __call__(self, known: Mapping[str, Any]) -> float:
        return float(self.coefficients @ regressors(known))


def solved(
    fits: Sequence[Fit], beta: np.ndarray, without: Sequence[str] = (), resamples: int = 2000
) -> Regression:
    """Return the regression that some fitted tables ask for.

    Args:
        fits: Fitted with ``beta``.
        beta: The coefficients.
        without: Regressors whose coefficient is to be 0.
        resamples: For the intervals.
    """
    kept = np.array([name not in without for name in NAMES])
    curvatures = np.array([one.curvature for one in fits])
    # The right side of the normal equations, for beta itself instead of a step.
    sides = np.array([one.gradient for one in fits]) + curvatures @ beta

    def coefficients(rows: np.ndarray) -> np.ndarray:
        S, side = curvatures[rows].sum(0), sides[rows].sum(0)
        S = S + np.diag(np.full(len(S), _USUAL**-2))
        found = np.zeros(len(S))
        found[kept] = np.linalg.solve(S[np.ix_(kept, kept)], (side + _START * _USUAL**-2)[kept])
        return found

    rng = np.random.default_rng(0)
    drawn = [coefficients(rng.integers(len(fits), size=len(fits))) for _ in range(resamples)]
    intervals = np.full((len(NAMES), 2), math.nan)
    if drawn:
        intervals = np.quantile(drawn, [0.025, 0.975], axis=0).T
    every = coefficients(np.arange(len(fits)))
    off = np.array([one.rate - regressors(one.known) @ every for one in fits])
    unsure = np.array([one.deviation for one in fits])
    # What a table has of its own: as far as it was found, and as far as it is not known.
    spread = math.sqrt(float(np.mean(off**2 + unsure**2)))
    return Regression(every, intervals, min(max(spread, 0.05), 0.6))


def fit_all(
    tables: Sequence[Table], says: Callable[[str], None], rounds: int = ROUNDS
) -> tuple[list[Fit], Regression]:
    """Fit tables and regression together."""
    chosen = [table for table in tables if len(table) >= FEWEST]
    beta, spread = _START, 0.4
    fits: list[Fit] = [fit(table, beta, spread) for table in chosen]
    for turn in range(rounds):
        regression = solved(fits, beta, resamples=0)
        step = np.clip(regression.coefficients - beta, -0.3, 0.3)
        beta, spread = beta + step, regression.spread
        fits = [fit(one.table, beta, spread, one.theta) for one in fits]
        told = ", ".join(f"{name} {value:.2f}" for name, value in zip(NAMES, beta, strict=True))
        says(f"round {turn + 1}: {len(fits)} tables, {told}, spread {spread:.2f}")
    return fits, solved(fits, beta)


def left_over(fits: Sequence[Fit]) -> tuple[float, float]:
    """Return (deviation of what the form leaves, noise) that the runs make most likely.

    Both are shares of each table's deviation from its form; a grid is enough.
    """
    grid = [(left, noise) for left in (0.01, 0.4, 0.6, 0.8) for noise in (0.2, 0.4, 0.6, 0.8, 1.0)]

    def likelihood(left: float, noise: float) -> float:
        total = 0.0
        for one in fits:
            v = natural(one.table.parameters)
            y = quality(one.table) - one.form(v)
            y = y / max(float(np.sqrt(np.mean(y**2))), 1e-3)
            K = left**2 * correlation(v, v) + noise**2 * np.eye(len(y))
            _, logdet = np.linalg.slogdet(K)
            total -= 0.5 * (float(y @ np.linalg.solve(K, y)) + float(logdet))
        return total

    return max(grid, key=lambda pair: likelihood(*pair))


def entry(one: Fit, left: float, noise: float) -> dict[str, Any]:
    """Return a table's entry of ``scaled.json``.

    Args:
        one: The fit.
        left: Deviation of what the form leaves, in quality.
        noise: Of a run.
    """
    return {
        "form": {name: round(value, 4) for name, value in asdict(one.form).items()},
        "left": round(left, 4),
        "noise": round(noise, 4),
        "facts": {
            "runs": len(one.table),
            "r2": round(one.r2, 3),
            "rate": round(one.rate, 3),
            "rate_deviation": round(one.deviation, 3),
        },
    }


def write(path: Path, fits: Sequence[Fit], regression: Regression) -> None:
    """Write the fits of all tables with scale in them, and the regression."""
    fits = [one for one in fits if set(one.table.parameters) == set(scaled.VARIED)]
    left, noise = left_over(fits)
    made = {}
    for one in fits:
        apart = quality(one.table) - one.form(natural(one.table.parameters))
        error = float(np.sqrt(np.mean(np.minimum(np.abs(apart), 0.3) ** 2)))
        measured = one.table.noise
        own = measured if math.isfinite(measured) else noise * error
        made[one.table.task.name] = entry(one, left * error, max(own, 0.003))
    tables = ",\n".join(f"{json.dumps(name)}: {json.dumps(made[name])}" for name in sorted(made))
    coefficients = regression.coefficients.round(4).tolist()
    said = {
        "coefficients": dict(zip(NAMES, coefficients, strict=True)),
        "spread": round(regression.spread, 4),
    }
    path.write_text(
        f'{{"rate": {json.dumps(said)},\n"tables": {{\n{tables}\n}}}}\n', encoding="utf-8"
    )
