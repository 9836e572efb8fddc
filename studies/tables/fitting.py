"""Fit the surfaces' hyperparameters and say, by cross-validation, how good the surfaces are."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import costs
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import surfaces
from studies.tables import counting

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from optuna_lora_rl.learning.tables.dataset import Table

FOLDS = 5
_SEED = 0
_COST_TOLERANCE = 1e-3


def fit(table: Table, price: costs.Costs) -> dict[str, Any]:
    """Return a table's entry of ``surfaces.json``: hyperparameters and facts.

    The facts: ``runs`` and ``configurations``, of which ``diverged``; ``noise``, the deviation
    of the final quality between seeds; ``best`` and ``median`` of the measured final quality;
    coefficient of determination and rank correlation of the final quality (``r2``,
    ``spearman``) over five folds of configurations, whose hyperparameters are fitted without
    the fold; and ``cost_error``, the largest relative error of the counted costs.
    """
    X, wanted = coordinates.matrix(table.parameters), surfaces.targets(table)
    theta: dict[str, list[float] | None] = {"curve": None, "divergence": None}
    final, predicted = wanted["curve"][:, -1], np.zeros(len(table))
    theta["curve"], predicted = _fit(X, final, _folds(table))
    if np.ptp(wanted["divergence"]) > 0:
        theta["divergence"], _ = _fit(X, wanted["divergence"][:, 0], None)
    counted = price(torch.from_numpy(X)[None])[0].numpy()
    facts = {
        "runs": len(table),
        "configurations": len(set(table.configuration.tolist())),
        "diverged": int((wanted["divergence"] > 0).sum()),
        "noise": table.noise,
        "best": float(final.max()),
        "median": float(np.median(final)),
        "r2": float(1 - np.mean((final - predicted) ** 2) / final.var()),
        "spearman": _rank_correlation(final, predicted),
        "cost_error": float(np.abs(counted / table.cost - 1).max()),
    }
    known = {name: None if math.isnan(fact) else round(fact, 4) for name, fact in facts.items()}
    return {**theta, "facts": known}


def _folds(table: Table) -> NDArray[np.int64]:
    """Return each run's fold; all seeds of a configuration are in one."""
    order = np.random.default_rng(_SEED).permutation(int(table.configuration.max()) + 1)
    folds: NDArray[np.int64] = order[table.configuration] % FOLDS
    return folds


def _fit(
    X: NDArray[np.float64], y: NDArray[np.float64], fold: NDArray[np.int64] | None
) -> tuple[list[float], NDArray[np.float64]]:
    """Return hyperparameters of all runs, and predictions of each run without its fold, if any."""
    standard = (y - y.mean()) / y.std()
    whole, without = surfaces.fit(X, standard), np.zeros(len(y))
    seen = coordinates.turned(torch.from_numpy(X)).numpy()
    for one in range(FOLDS) if fold is not None else ():
        left = fold == one
        without[left] = surfaces.fit(X[~left], standard[~left]).posterior(seen[left])[0]
    return [round(value, 4) for value in whole.theta.tolist()], y.mean() + y.std() * without


def _rank_correlation(y: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(y, predicted).statistic)


def fit_all(path: Path, fits: Path, prices: Path, says: Callable[[str], None]) -> None:
    """Fit every table of a compiled file, count its costs, and write both.

    Raises:
        UserError: The counted costs are not those that were measured.
    """
    made, counted = {}, {}
    for table in dataset.load(path=path):
        name = table.task.name
        counted[name] = counting.counted(name)
        entry = made[name] = fit(table, costs.Costs(counted[name][None]))
        facts = entry["facts"]
        if facts["cost_error"] > _COST_TOLERANCE:
            raise UserError(
                f"The costs of {name} are off by {facts['cost_error']:.1%} from those measured; "
                "its data differ here (real text comes from Python's own standard library)."
            )
        says(f"{name}: R2 {facts['r2']}, Spearman {facts['spearman']}")
    counting.write(prices, counted)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in made.items())
    fits.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def markdown(path: Path, fits: Path) -> str:
    """Return in Markdown what each table holds and how good its surface is."""
    known = json.loads(fits.read_text(encoding="utf-8"))
    head = (
        "| table | split | runs | configurations | diverged | untuned loss | median | best "
        "| seed noise | R2 | Spearman |"
    )
    tables = dataset.load(path=path)
    runs = sum(map(len, tables))
    rows = [f"{len(tables)} tables, {runs:,} runs, {path.stat().st_size / 1e6:.2f} MB:", ""]
    rows += [head, "| --- | --- |" + " ---: |" * 9]
    for table in tables:
        facts = known[table.task.name]["facts"]
        numbers = [
            f"{facts[name]:.3f}" if facts[name] is not None else "-"
            for name in ("median", "best", "noise", "r2", "spearman")
        ]
        counts = [str(facts[name]) for name in ("runs", "configurations", "diverged")]
        cells = [f"`{table.task.name}`", table.task.split, *counts, f"{table.untuned:.3f}"]
        rows.append(f"| {' | '.join([*cells, *numbers])} |")
    return "\n".join(rows)
