"""The samplers of a comparison, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.comparison import openings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.samplers import BaseSampler

    from optuna_lora_rl.learning.comparison.problem import Problem
    from optuna_lora_rl.learning.comparison.protocol import SamplerEntry

# Optimisers of other libraries; they take no options.
OUTSIDE = ("auto", "smac", "hebo")
NAMES = (*samplers.NAMES, *OUTSIDE)

# Takes what the opening's earlier trials scored (None: failed), and returns its next
# configuration or None at its end.
Opening = Callable[["Sequence[float | None]"], "dict[str, Any] | None"]


def create(entry: SamplerEntry, problem: Problem, *, seed: int, trials: int) -> BaseSampler:
    """The sampler of an entry for one study of a problem.

    Raises:
        UserError: unknown option, or a package that is not installed.
    """
    if entry.name not in OUTSIDE:
        return samplers.create(entry.name, seed=seed, options=entry.options)
    if entry.options:
        raise UserError(
            f"sampler {entry.name!r} has no option {min(entry.options)!r}; it has none here"
        )
    from optuna_lora_rl.learning.comparison import outside

    if entry.name == "auto":
        return outside.auto_sampler(seed)
    if entry.name == "smac":
        return outside.SmacSampler(problem.space, seed, trials)
    return outside.HeboSampler(problem.space, seed)


def opening(entry: SamplerEntry, problem: Problem) -> Opening:
    """What the entry's sampler is preceded by."""
    if entry.start == "sweep":
        return lambda scores: openings.sweep(problem.space, scores)
    if entry.start == "defaults":
        return lambda scores: None if scores else openings.defaults(problem.space)
    return lambda scores: None
