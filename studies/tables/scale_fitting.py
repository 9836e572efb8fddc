"""Fit the tables with scale in them, and say how the best learning rate moves.

Each table is fitted with the form of ``policy.lora_surfaces.Shapes`` by least squares under a
prior on its parameters. The prior of the best rate is a regression on what is known before a run
(``REGRESSORS``), which is fitted to the tables' best rates in turn; the two alternate a few times
(empirical Bayes). Rates are those of the best effective rate at alpha = 2 rank, rank 16, all
linear modules, and at the middle of the table's own steps and batch sizes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from optuna_lora_rl.learning.scaled_surfaces import correlation
from optuna_lora_rl.learning.scaled_surfaces import form
from optuna_lora_rl.learning.scaled_surfaces import natural
from optuna_lora_rl.learning.scaled_surfaces import quality
from optuna_lora_rl.policy.lora_surfaces import Shapes

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping
    from collections.abc import Sequence
    from pathlib import Path

    from optuna_lora_rl.learning.tables.dataset import Table

FEWEST = 8
"""Runs below which a table is not fitted."""
ROUNDS = 3

# Mean, deviation and bounds of each parameter of a form: what the 26 other tables say
# (studies/bank_shapes.py), wider where scale may move it.
PRIOR = {
    "by_ratio": (0.64, 0.12, 0.0, 1.3),
    "by_rank": (0.55, 0.2, -0.3, 1.3),
    "by_size": (0.5, 0.2, -0.5, 1.3),
    "by_steps": (0.3, 0.3, -0.6, 1.3),
    "by_batch": (0.05, 0.25, -0.9, 0.9),
    "below": (0.75, 0.35, 0.2, 2.5),
    "above": (0.75, 0.35, 0.2, 2.5),
    "flat": (0.6, 0.3, 0.0, 1.0),
    "cliff": (1.8, 0.7, 0.3, 3.5),
    "gain": (0.2, 0.2, 0.0, 1.5),
    "half": (0.6, 1.5, -2.0, 7.0),
    "scale": (4.0, 2.0, 0.6, 8.0),
    "steps": (0.1, 0.1, 0.0, 0.5),
    "batch": (0.04, 0.06, -0.2, 0.3),
    "overfit": (0.0, 0.06, 0.0, 0.3),
    "onset": (3.0, 2.0, -2.0, 8.0),
    "dropout": (0.01, 0.05, -0.3, 0.5),
}
SCALE = {"offset": (0.5, 0.5, -3.0, 3.0), "span": (0.5, 0.4, 0.02, 3.0)}
# Deviation of a run from its form, in quality.
_FORM_ERROR = 0.06
_LOG10_2 = math.log10(2.0)

REGRESSORS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "one": lambda known: 1.0,
    "width": lambda known: math.log10(known["hidden_size"] / 128),
    "depth": lambda known: math.log10(known["model_layers"] / 4),
    "steps": lambda known: math.log10(known["steps"] / 48),
    "batch": lambda known: math.log10(known["batch_size"] / 8),
    "examples": lambda known: math.log10(known["examples"] / 256),
}
"""What the best rate is regressed on: decades from a run of 48 steps of 8 rows out of 256
examples, of a model 128 wide with 4 layers."""


@dataclass(frozen=True)
class Fit:
    """A fitted table.

    Attributes:
        table: Its runs.
        known: Its context, with ``steps`` and ``batch_size`` in the middle of the table's.
        parameters: Of the form, with ``peak``, ``offset`` and ``span``.
        rate: log10 of the best rate at ``known``, alpha = 2 rank, rank 16, all linear modules.
        deviation: Of ``rate``, from the curvature of the fit.
        r2: Share of the variance of the runs that the form explains.
    """

    table: Table
    known: dict[str, Any]
    parameters: dict[str, float]
    rate: float
    deviation: float
    r2: float


def known_of(table: Table) -> dict[str, Any]:
    """Return a table's context with the middle of its steps and batch sizes."""
    middle = {
        name: 2.0 ** float(np.mean(np.log2(np.unique(table.parameters[column]))))
        for name, column in (("steps", "max_steps"), ("batch_size", "batch_size"))
    }
    return {**table.task.context, **middle}


def fit(table: Table, expected: float, spread: float) -> Fit:
    """Fit one table.

    Args:
        table: Its runs.
        expected: log10 of the best rate that is expected at the table's own middle.
        spread: Its deviation.
    """
    v, y, known = natural(table.parameters), quality(table), known_of(table)
    names = ["rate", *PRIOR, *SCALE]
    mean, deviation, low, high = np.array(
        [(expected, spread, -5.0, 0.0), *PRIOR.values(), *SCALE.values()]
    ).T
    longer = math.log10(known["steps"] / 64)
    wider = math.log10(known["batch_size"] / 8)

    def peak(at: Mapping[str, float]) -> float:
        # The form's own peak is that of 64 steps of 8 rows.
        return at["rate"] + at["by_steps"] * longer - at["by_batch"] * wider

    def predicted(x: np.ndarray) -> np.ndarray:
        at = dict(zip(names, x, strict=True))
        own = {name: at[name] for name in PRIOR} | {"cost": 0.0, "compute": 0.0, "peak": peak(at)}
        one = Shapes(**{name: np.array([value]) for name, value in own.items()})
        values: np.ndarray = at["offset"] + at["span"] * one(v)[0]
        return values

    def residuals(x: np.ndarray) -> np.ndarray:
        # Divergence is far from any form; it counts for no more than a few deviations.
        apart = (predicted(x) - y) / _FORM_ERROR
        return np.concatenate([2 * np.arctan(apart / 2), (x - mean) / deviation])

    best: Any = None
    for off in (0.0, -0.7, 0.7):
        start = np.clip(mean, low + 1e-6, high - 1e-6)
        start[0] = min(max(expected + off, -4.9), -0.1)
        start[-2:] = np.quantile(y, 0.9), max(float(np.ptp(y)), 0.1)
        found = least_squares(residuals, start, bounds=(low, high), diff_step=1e-4, max_nfev=80)
        if best is None or found.cost < best.cost:
            best = found
    at = dict(zip(names, best.x.tolist(), strict=True))
    covariance = np.linalg.pinv(best.jac.T @ best.jac)
    spread_of_y = float(np.square(y - y.mean()).sum()) or 1.0
    return Fit(
        table,
        known,
        {**at, "peak": peak(at)},
        at["rate"],
        float(np.sqrt(covariance[0, 0])),
        1 - float(np.square(predicted(best.x) - y).sum()) / spread_of_y,
    )


@dataclass(frozen=True)
class Regression:
    """log10 of the best rate on what is known.

    Attributes:
        names: Of the regressors.
        coefficients: One for each, in decades a decade.
        intervals: 95% of the coefficients over resampled tables, shape (regressors, 2).
        spread: Deviation of a table's best rate from the regression.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    intervals: np.ndarray
    spread: float

    def __call__(self, known: Mapping[str, Any]) -> float:
        return float(self.coefficients @ [REGRESSORS[name](known) for name in self.names])


def regress(
    fits: Sequence[Fit], names: Sequence[str] = tuple(REGRESSORS), resamples: int = 1000
) -> Regression:
    """Regress the fitted best rates, each weighted by how well it is known.

    Steps and batch size move the rate within a table too: its own exponents say so far better
    than the differences between tables, so each table counts at both ends of its range.
    """
    rows, rates, deviations, owners = [], [], [], []
    for number, one in enumerate(fits):
        for known, rate in _ends(one):
            rows.append([REGRESSORS[name](known) for name in names])
            rates.append(rate)
            deviations.append(one.deviation)
            owners.append(number)
    X, y, own = np.array(rows), np.array(rates), np.array(owners)
    s2 = np.square(deviations)
    spread = 0.2
    for _ in range(20):
        coefficients = _weighted(X, y, 1 / (s2 + spread**2))
        left = y - X @ coefficients
        # The moment estimate of the variance between tables (DerSimonian & Laird 1986).
        spread = math.sqrt(max(float(np.mean(left**2 - s2)), 0.05**2))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        kept = rng.integers(len(fits), size=len(fits))
        places = np.concatenate([np.flatnonzero(own == number) for number in kept])
        weights = 1 / (s2[places] + spread**2)
        drawn.append(_weighted(X[places], y[places], weights))
    intervals = np.full((len(names), 2), math.nan)
    if drawn:
        intervals = np.quantile(drawn, [0.025, 0.975], axis=0).T
    return Regression(tuple(names), coefficients, intervals, spread)


def _ends(one: Fit) -> list[tuple[dict[str, Any], float]]:
    """A table's best rate at the ends of its steps and of its batch sizes, one at a time."""
    ends = []
    for name, column, power in (
        ("steps", "max_steps", -one.parameters["by_steps"]),
        ("batch_size", "batch_size", one.parameters["by_batch"]),
    ):
        for value in (one.table.parameters[column].min(), one.table.parameters[column].max()):
            known = {**one.known, name: float(value)}
            moved = power * math.log10(float(value) / one.known[name])
            ends.append((known, one.rate + moved))
    return ends


def _weighted(X: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # A little shrinkage, for resamples in which two regressors cannot be told apart.
    gram = (X.T * weights) @ X + 1e-3 * np.eye(X.shape[1])
    solved: np.ndarray = np.linalg.solve(gram, (X.T * weights) @ y)
    return solved


def fit_all(
    tables: Sequence[Table], says: Callable[[str], None], rounds: int = ROUNDS
) -> tuple[list[Fit], Regression]:
    """Fit tables and the regression of their best rates in turn."""
    chosen = [table for table in tables if len(table) >= FEWEST]
    regression: Regression | None = None
    fits: list[Fit] = []
    for turn in range(rounds):
        fits = []
        for table in chosen:
            expected, spread = -2.1, 0.6
            if regression is not None:
                expected, spread = regression(known_of(table)), max(regression.spread, 0.15)
            fits.append(fit(table, expected, spread))
        regression = regress(fits, resamples=1000 if turn == rounds - 1 else 0)
        says(f"round {turn + 1}: {len(fits)} tables, spread {regression.spread:.2f} decades")
    assert regression is not None
    return fits, regression


def left_over(fits: Sequence[Fit]) -> tuple[float, float]:
    """Return (deviation of what the form leaves, noise) that the runs make most likely.

    Both are shares of each table's deviation from its form; a grid is enough.
    """
    grid = [(left, noise) for left in (0.01, 0.4, 0.6, 0.8) for noise in (0.2, 0.4, 0.6, 0.8, 1.0)]

    def likelihood(left: float, noise: float) -> float:
        total = 0.0
        for one in fits:
            v = natural(one.table.parameters)
            y = quality(one.table) - form(entry(one, 0.0, 0.0), v)
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
    own = {name: one.parameters[name] for name in ("peak", *PRIOR)} | {"cost": 0.0, "compute": 0.0}
    return {
        "shape": {name: round(value, 4) for name, value in own.items()},
        "offset": round(one.parameters["offset"], 4),
        "span": round(one.parameters["span"], 4),
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
    """Write the fits of all tables, and the regression."""
    left, noise = left_over(fits)
    made = {}
    for one in fits:
        apart = quality(one.table) - form(entry(one, 0, 0), natural(one.table.parameters))
        error = float(np.sqrt(np.mean(np.minimum(np.abs(apart), 0.3) ** 2)))
        measured = one.table.noise
        own = measured if math.isfinite(measured) else noise * error
        made[one.table.task.name] = entry(one, left * error, max(own, 0.003))
    tables = ",\n".join(f"{json.dumps(name)}: {json.dumps(made[name])}" for name in sorted(made))
    said = {
        "coefficients": dict(
            zip(regression.names, regression.coefficients.round(4).tolist(), strict=True)
        ),
        "spread": round(regression.spread, 4),
    }
    path.write_text(
        f'{{"rate": {json.dumps(said)},\n"tables": {{\n{tables}\n}}}}\n', encoding="utf-8"
    )
