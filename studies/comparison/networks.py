"""Tuning a small classifier, as measured: what has to do with networks, but not with LoRA.

    python -m studies.comparison.networks

measures scikit-learn's MLPClassifier on its three built-in classification sets over a grid (about
five minutes) and writes ``networks.json``. Between the grid's points the log loss is interpolated
linearly along each axis's scale, so the best point of the grid is the best of all.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from studies.comparison.problem import OTHER
from studies.comparison.problem import Problem
from studies.comparison.problem import draw

FILE = Path(__file__).with_suffix(".json")
_EPOCHS = 12
_SEEDS = 2
_EXAMPLES = 700
# Log loss of a run that diverged, and the most that any is given.
_MOST = 3.0
# Logarithmic axes.
AXES: dict[str, tuple[float, ...]] = {
    "learning_rate_init": tuple(10.0 ** (-4 + 0.5 * k) for k in range(7)),
    "hidden_units": (8, 16, 32, 64, 128),
    "alpha": (1e-6, 1e-4, 1e-2, 1.0),
    "batch_size": (16, 64, 256),
}
ACTIVATIONS = ("relu", "tanh")
DATA = ("digits", "wine", "breast_cancer")
_SPACE: dict[str, BaseDistribution] = {
    "learning_rate_init": FloatDistribution(1e-4, 1e-1, log=True),
    "hidden_units": IntDistribution(8, 128, log=True),
    "alpha": FloatDistribution(1e-6, 1.0, log=True),
    "batch_size": IntDistribution(16, 256, log=True),
    "activation": CategoricalDistribution(ACTIVATIONS),
}


def network_problems() -> list[Problem]:
    """One problem for each data set."""
    return [_problem(name) for name in DATA]


@cache
def _measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def _problem(name: str) -> Problem:
    from scipy.interpolate import RegularGridInterpolator

    # Shape (activations, learning rates, units, alphas, batch sizes, seeds).
    loss = np.array(_measured()["log_loss"][name])
    loss = loss.reshape(len(ACTIVATIONS), *(len(axis) for axis in AXES.values()), _SEEDS)
    # Of a typical point: the median is not moved by those that diverge with one seed only.
    noise = 1.4826 * float(np.median(np.abs(loss[..., 0] - loss[..., 1]))) / math.sqrt(2)
    mean = loss.mean(-1)
    axes = [np.log(axis) for axis in AXES.values()]
    surface = {
        activation: RegularGridInterpolator(axes, mean[k])
        for k, activation in enumerate(ACTIVATIONS)
    }

    def value(params: dict[str, Any]) -> float:
        point = [
            min(max(math.log(params[key]), axis[0]), axis[-1])
            for key, axis in zip(AXES, axes, strict=True)
        ]
        return float(surface[params["activation"]](point)[0])

    rng = np.random.default_rng(0)
    best = float(mean.min())
    span = float(np.median([value(draw(_SPACE, rng)) for _ in range(2000)])) - best

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        v = value(params)
        return -v + noise * rng.normal(), (v - best) / span

    return Problem(f"network-{name}", "network tuning, measured", OTHER, _SPACE, evaluate)


def measure() -> dict[str, Any]:
    """Validation log losses over the grid, by data set."""
    started = time.perf_counter()
    grid = list(itertools.product(ACTIVATIONS, itertools.product(*AXES.values())))
    losses = {
        name: [_losses(_split(name), activation, point) for activation, point in grid]
        for name in DATA
    }
    return {
        "command": "python -m studies.comparison.networks",
        "scikit-learn": version("scikit-learn"),
        "epochs": _EPOCHS,
        "seconds": round(time.perf_counter() - started),
        "log_loss": losses,
    }


def _split(name: str) -> list[Any]:
    """Training and validation inputs, then labels; inputs standardised by the training ones."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    x, y = x[:_EXAMPLES], y[:_EXAMPLES]
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.4, random_state=0, stratify=y
    )
    scaler = StandardScaler().fit(train_x)
    return [scaler.transform(train_x), scaler.transform(test_x), train_y, test_y]


def _losses(data: list[Any], activation: str, point: tuple[float, ...]) -> list[float]:
    """Of each seed at a point of the grid."""
    from sklearn.metrics import log_loss
    from sklearn.neural_network import MLPClassifier

    train_x, test_x, train_y, test_y = data
    rate, units, alpha, batch = point
    losses = []
    for seed in range(_SEEDS):
        model = MLPClassifier(
            (int(units),),
            activation=activation,
            learning_rate_init=rate,
            alpha=alpha,
            batch_size=min(int(batch), len(train_x)),
            max_iter=_EPOCHS,
            random_state=seed,
        )
        with warnings.catch_warnings():
            # It says that so few epochs may not be enough.
            warnings.simplefilter("ignore")
            model.fit(train_x, train_y)
            found = log_loss(test_y, model.predict_proba(test_x))
        losses.append(round(min(float(found), _MOST), 4))
    return losses


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure()) + "\n", encoding="utf-8")
