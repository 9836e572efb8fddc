"""Something to tune, with a best value that is known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution

if TYPE_CHECKING:
    import optuna

LORA, OTHER = "LoRA", "not LoRA"

# Takes a configuration and a random generator for the noise; returns the observed score (larger
# is better) and the regret without noise; raises FloatingPointError for a failed run.
Evaluate = Callable[[dict[str, Any], np.random.Generator], tuple[float, float]]


@dataclass(frozen=True)
class Problem:
    """Something to tune.

    Args:
        name: for the records; problems of one comparison differ in it.
        group: problems of one group are averaged.
        domain: ``LORA`` or ``OTHER``; all groups of one domain are averaged too.
        space: Optuna's distributions by parameter name.
        evaluate: see ``Evaluate``.
        surface: problems with the same are one surface in several guises; its name by default.
    """

    name: str
    group: str
    domain: str
    space: Mapping[str, BaseDistribution]
    evaluate: Evaluate
    surface: str = ""

    def run(self, trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
        """Suggest all parameters and evaluate them."""
        return self.evaluate(
            {name: trial._suggest(name, d) for name, d in self.space.items()}, rng
        )

    def fingerprint(self) -> str:
        """Changes when the space or what its configurations score does."""
        rng = np.random.default_rng(0)
        said = [f"{name}: {d!r}" for name, d in self.space.items()]
        for _ in range(8):
            try:
                _, regret = self.evaluate(draw(self.space, rng), np.random.default_rng(0))
                said.append(f"{regret:.6g}")
            except FloatingPointError:
                said.append("failed")
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]


def draw(space: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A configuration at random."""
    params: dict[str, Any] = {}
    for name, d in space.items():
        if isinstance(d, CategoricalDistribution):
            params[name] = d.choices[rng.integers(len(d.choices))]
            continue
        low, high = (math.log(d.low), math.log(d.high)) if d.log else (d.low, d.high)
        u = rng.uniform(low, high)
        value = min(max(math.exp(u) if d.log else u, d.low), d.high)
        params[name] = round(value) if isinstance(d, IntDistribution) else value
    return params
