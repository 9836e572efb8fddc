"""The samplers of a comparison, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

from optuna.samplers import BaseSampler

from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.study import guides
from studies.comparison import openings
from studies.comparison.importing import imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studies.comparison.problem import Problem
    from studies.comparison.protocol import SamplerEntry

# Optimisers of other libraries, by what builds them.
OUTSIDE = {"smac": "studies.comparison.outside:SmacSampler"}
NAMES = (*samplers.NAMES, *OUTSIDE)

# Takes what the opening's earlier trials scored (None: failed), and returns its next
# configuration or None at its end.
Opening = Callable[["Sequence[float | None]"], "dict[str, Any] | None"]


def create(entry: SamplerEntry, problem: Problem, *, seed: int, trials: int) -> BaseSampler:
    """The sampler of an entry for one study of a problem.

    Of what builds an imported one, arguments called ``seed``, ``space`` (Optuna's distributions
    by name) and ``n_trials`` are given; all others are the entry's options.

    Raises:
        UserError: unknown option, or a module or package that is not there.
    """
    path = entry.import_ or OUTSIDE.get(entry.name)
    if path is None:
        return samplers.create(entry.name, seed=seed, options=entry.options)
    build = imported(f"samplers.{entry.name}.import", path)
    given = {"seed": seed, "space": problem.space, "n_trials": trials}
    try:
        known = inspect.signature(build).parameters
        sampler = build(**{k: v for k, v in given.items() if k in known} | entry.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"sampler {entry.name!r} cannot be made: {first_line(error)}") from error
    if not isinstance(sampler, BaseSampler):
        raise UserError(f"sampler {entry.name!r}: {path} gives no Optuna sampler")
    return sampler


def opening(entry: SamplerEntry, problem: Problem) -> Opening:
    """What the entry's sampler is preceded by."""
    if entry.start == "sweep":
        return lambda scores: openings.sweep(problem.space, scores)
    if entry.start == "defaults":
        return lambda scores: None if scores else guides.defaults(problem.space)
    return lambda scores: None
