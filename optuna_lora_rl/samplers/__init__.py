"""Optuna samplers: the learned one, the bandit baseline, and Optuna's own by name.

>>> from optuna_lora_rl import samplers
>>> samplers.create("tpe", seed=1, options={"n_startup_trials": 5}).__class__.__name__
'TPESampler'
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl import by_name
from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.samplers.bandit import BanditSampler
    from optuna_lora_rl.samplers.rl import RLSampler

__all__ = ["NAMES", "BanditSampler", "RLSampler", "check", "create", "proposal"]

# Where a trial keeps what its sampler had in mind.
PROPOSAL_KEY = "optuna_lora_rl:proposal"
# Where a study keeps what is known of model, data and run.
CONTEXT_KEY = "optuna_lora_rl:context"

_HOMES = {
    "rl": ("optuna_lora_rl.samplers.rl", "RLSampler"),
    "bandit": ("optuna_lora_rl.samplers.bandit", "BanditSampler"),
    "tpe": ("optuna.samplers", "TPESampler"),
    "gp": ("optuna.samplers", "GPSampler"),
    "cmaes": ("optuna.samplers", "CmaEsSampler"),
    "random": ("optuna.samplers", "RandomSampler"),
    "qmc": ("optuna.samplers", "QMCSampler"),
    "nsgaii": ("optuna.samplers", "NSGAIISampler"),
}
NAMES = tuple(_HOMES)

# What Optuna 5 only warns about and ignores.
_DEPRECATED = {
    "consider_prior",
    "prior_weight",
    "consider_magic_clip",
    "consider_endpoints",
    "x0",
    "sigma0",
    "restart_strategy",
    "inc_popsize",
}

_AT_LEAST_0 = (0, float("inf"))
_AT_LEAST_1 = (1, float("inf"))
_LIMITS: dict[str, tuple[float, float]] = {
    "n_startup_trials": _AT_LEAST_0,
    "n_ei_candidates": _AT_LEAST_1,
    "n_candidates": _AT_LEAST_1,
    "n_trials": _AT_LEAST_1,
    "popsize": (2, float("inf")),
    "population_size": (2, float("inf")),
    "mutation_prob": (0, 1),
    "crossover_prob": (0, 1),
    "swapping_prob": (0, 1),
    "exploration": _AT_LEAST_0,
}


def create(
    name: str,
    *,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    source_studies: Sequence[Study] = (),
) -> BaseSampler:
    """Return the sampler called ``name``.

    Args:
        name: one of ``NAMES``.
        seed: makes the study reproducible; a whole number from 0 to 2**32 - 1.
        options: keyword arguments of the sampler's class, except ``seed`` and those that a file
            cannot say.
        source_studies: earlier studies to start from, for ``rl`` alone.

    Raises:
        UserError: unknown name or option, wrong type, a value out of range, or a package that
            the sampler needs is not installed.
    """
    module, class_name = by_name.choose("sampler", name, _HOMES)
    if seed is not None and not (is_whole(seed) and 0 <= seed < 2**32):
        raise UserError(f"seed is {seed!r}, but must be a whole number from 0 to {2**32 - 1}")
    if name == "cmaes" and find_spec("cmaes") is None:
        raise UserError(
            "sampler 'cmaes' needs the package cmaes: pip install 'optuna_lora_rl[cmaes]'"
        )
    return by_name.build(
        f"sampler {name!r}",
        getattr(import_module(module), class_name),
        {} if options is None else options,
        given={"seed": seed} | ({"source_studies": source_studies} if source_studies else {}),
        hidden=_DEPRECATED,
        limits=_LIMITS,
    )


def check(name: str, *, n_objectives: int) -> None:
    """Raise ``UserError`` where the sampler cannot serve a study of so many objectives."""
    by_name.choose("sampler", name, _HOMES)
    if name == "cmaes" and n_objectives > 1:
        raise UserError(
            f"sampler 'cmaes' works with one objective, but the study has {n_objectives}; "
            "use 'rl', 'gp', 'tpe' or 'nsgaii'"
        )


def proposal(trial: FrozenTrial) -> dict[str, Any] | None:
    """Why a trial got its parameters, where one of this package's samplers proposed them.

    The dictionary has the key ``"source"``; the rest depends on the sampler.
    """
    return trial.system_attrs.get(PROPOSAL_KEY)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, NumPy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def __getattr__(name: str) -> Any:
    for module, class_name in (_HOMES["rl"], _HOMES["bandit"]):
        if name == class_name:
            return getattr(import_module(module), class_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
