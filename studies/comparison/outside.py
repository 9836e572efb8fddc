"""Optimisers of other libraries as Optuna samplers, for comparisons: whole spaces known at once.

They keep their own state, so one sampler serves one study in one process.
"""

from __future__ import annotations

import logging
import tempfile
from abc import ABC
from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.study import Study
    from optuna.trial import FrozenTrial


class _AskAndTell(BaseSampler, ABC):
    """An optimiser that asks for whole configurations of a space that it knows beforehand.

    A failed run costs as much as the worst so far; before there is one it is not told.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        self._space = dict(space)
        self._random = RandomSampler(seed=seed)
        self._costs: list[float] = []

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.ask()

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, name, distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        if values is not None:
            self._costs.append(sign * values[0])
            self.tell(self._costs[-1])
        elif self._costs:
            self.tell(max(self._costs))

    @abstractmethod
    def ask(self) -> dict[str, Any]:
        """Return the next configuration."""

    @abstractmethod
    def tell(self, cost: float) -> None:
        """Take the cost of what was asked for last."""


class SmacSampler(_AskAndTell):
    """SMAC3's facade for hyperparameter optimisation (random forest), at its defaults.

    Lindauer et al. 2022, "SMAC3: A Versatile Bayesian Optimization Package".
    """

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int, n_trials: int) -> None:
        _need("smac", "pip install 'optuna_lora_rl[peers]'")
        import smac
        from ConfigSpace import ConfigurationSpace

        super().__init__(space, seed)
        logging.getLogger("smac").setLevel(logging.ERROR)
        self._folder = tempfile.TemporaryDirectory(prefix="smac-")
        configurations = ConfigurationSpace(seed=seed)
        configurations.add([_configspace(name, d) for name, d in space.items()])
        scenario = smac.Scenario(
            configurations,
            deterministic=True,
            n_trials=n_trials,
            seed=seed,
            output_directory=Path(self._folder.name),
        )
        self._smac = smac.HyperparameterOptimizationFacade(
            scenario, lambda config, seed: 0.0, overwrite=True, logging_level=False
        )
        self._asked: Any = None

    def ask(self) -> dict[str, Any]:
        self._asked = self._smac.ask()
        found = dict(self._asked.config)
        return {name: _native(found[name], d) for name, d in self._space.items()}

    def tell(self, cost: float) -> None:
        from smac.runhistory import StatusType
        from smac.runhistory import TrialValue

        self._smac.tell(self._asked, TrialValue(cost=cost, status=StatusType.SUCCESS))


def _need(package: str, how: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"sampler {package!r} needs the package {package}: {how}")


def _configspace(name: str, d: Any) -> Any:
    from ConfigSpace import Categorical
    from ConfigSpace import Float
    from ConfigSpace import Integer

    if isinstance(d, CategoricalDistribution):
        return Categorical(name, list(range(len(d.choices))))
    kind = Integer if isinstance(d, IntDistribution) else Float
    return kind(name, (d.low, d.high), log=d.log)


def _native(value: Any, d: Any) -> Any:
    """A plain value inside the range; choices travel as their positions."""
    if isinstance(d, CategoricalDistribution):
        return d.choices[int(value)]
    value = min(max(value, d.low), d.high)
    return round(value) if isinstance(d, IntDistribution) else float(value)
