"""Functions that have nothing to do with LoRA, shifted and rotated by a seed.

Minimised; value 0 is the best. The families and their conditioning follow the noiseless BBOB
functions (Hansen et al. 2009, "Real-parameter black-box optimization benchmarking 2009"), without
its oscillation and asymmetry transforms, hence "BBOB-like".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from studies.comparison.problem import OTHER
from studies.comparison.problem import Problem
from studies.comparison.problem import draw

# Configurations whose median value is regret 1.
_DRAWS = 2000


def _sphere(z: np.ndarray) -> float:
    return float(z @ z)


def _ellipsoid(z: np.ndarray) -> float:
    return float(10.0 ** np.linspace(0, 6, len(z)) @ z**2)


def _rosenbrock(z: np.ndarray) -> float:
    z = max(1.0, math.sqrt(len(z)) / 8) * z + 1.0
    return float((100.0 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1.0) ** 2).sum())


def _rastrigin(z: np.ndarray) -> float:
    return float(10.0 * (len(z) - np.cos(2 * math.pi * z).sum()) + z @ z)


def _ackley(z: np.ndarray) -> float:
    ripples = math.exp(np.cos(2 * math.pi * z).mean())
    return 20.0 + math.e - 20.0 * math.exp(-0.2 * math.sqrt((z @ z) / len(z))) - ripples


def _griewank(z: np.ndarray) -> float:
    z = 10.0 * z
    return float(1.0 + (z @ z) / 4000 - np.cos(z / np.sqrt(np.arange(1, len(z) + 1))).prod())


BBOB = {
    "sphere": _sphere,
    "ellipsoid": _ellipsoid,
    "rosenbrock": _rosenbrock,
    "rastrigin": _rastrigin,
    "ackley": _ackley,
    "griewank": _griewank,
}


def bbob_problem(family: str, dimensions: int, instance: int) -> Problem:
    """One of ``BBOB`` over [-5, 5]^d; the instance draws its shift and rotation."""
    rng = np.random.default_rng([zlib.crc32(family.encode()), dimensions, instance])
    optimum = rng.uniform(-4.0, 4.0, dimensions)
    rotation = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    function = BBOB[family]

    def value(params: dict[str, Any]) -> float:
        x = np.array([params[f"x{k}"] for k in range(dimensions)])
        return function(rotation @ (x - optimum))

    space = {f"x{k}": FloatDistribution(-5.0, 5.0) for k in range(dimensions)}
    name = f"{family}-{dimensions}d-{instance}"
    return _problem(name, f"BBOB-like, {dimensions} dimensions", space, value)


def mixed_problem(instance: int) -> Problem:
    """Floats, a logarithmic float, integers and two categorical parameters that interact."""
    rng = np.random.default_rng([20_000_003, instance])
    kinds = ("a", "b", "c", "d", "e")
    height = rng.permutation(np.linspace(0.0, 1.0, len(kinds)))
    places = rng.uniform(0.15, 0.85, (len(kinds), 4))
    places = places[0] + 0.35 * (places - places[0])  # each kind has its own, not far off
    weight = 10.0 ** rng.uniform(-0.5, 0.7, 4)
    bumps = rng.uniform(0.0, 0.15)
    lowest = {True: 0.0, False: rng.uniform(0.1, 0.5)}
    best_kind = int(height.argmin())

    def value(params: dict[str, Any]) -> float:
        unit = np.array(
            [
                params["x0"],
                (params["x1"] + 5) / 10,
                (math.log10(params["scale"]) + 5) / 5,
                (math.log2(params["width"]) - 3) / 6,
            ]
        )
        kind = kinds.index(params["kind"])
        z = unit - places[kind]
        total = weight @ z**2 + bumps * (1 - np.cos(6 * math.pi * z)).sum()
        total += 0.6 * height[kind] + lowest[params["flag"]] + abs(params["k"] - 7) / 25
        return float(total)

    space: dict[str, BaseDistribution] = {
        "x0": FloatDistribution(0.0, 1.0),
        "x1": FloatDistribution(-5.0, 5.0),
        "scale": FloatDistribution(1e-5, 1.0, log=True),
        "width": IntDistribution(8, 512, log=True),
        "k": IntDistribution(1, 20),
        "kind": CategoricalDistribution(kinds),
        "flag": CategoricalDistribution((True, False)),
    }
    # "width" is a whole number, so that the place itself may not exist: the nearest is the best.
    widths = [(math.log2(w) - 3) / 6 - places[best_kind, 3] for w in range(8, 513)]
    best = min(weight[3] * z**2 + bumps * (1 - math.cos(6 * math.pi * z)) for z in widths)
    return _problem(f"mixed-{instance}", "mixed spaces", space, lambda p: value(p) - best)


def _branin(params: dict[str, Any]) -> float:
    x, y = params["x"], params["y"]
    value = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    return value + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887


_A = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def _hartmann(params: dict[str, Any]) -> float:
    x = np.array([params[f"x{i}"] for i in range(6)])
    inner = np.exp(-np.sum(_A * (x - _P) ** 2, axis=1))
    return 3.32237 - float(np.array([1.0, 1.2, 3.0, 3.2]) @ inner)


def classic_problems() -> list[Problem]:
    """Branin and Hartmann's function of six dimensions."""
    plane: dict[str, BaseDistribution] = {
        "x": FloatDistribution(-5.0, 10.0),
        "y": FloatDistribution(0.0, 15.0),
    }
    cube: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(6)}
    return [
        _problem("branin", "Branin and Hartmann", plane, _branin),
        _problem("hartmann6", "Branin and Hartmann", cube, _hartmann),
    ]


def _problem(
    name: str,
    group: str,
    space: dict[str, Any],
    value: Callable[[dict[str, Any]], float],
) -> Problem:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    median = float(np.median([value(draw(space, rng)) for _ in range(_DRAWS)]))

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        v = value(params)
        return -v, max(0.0, v / median)

    return Problem(name, group, OTHER, space, evaluate)
