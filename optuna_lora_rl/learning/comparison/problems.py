"""The problems that a protocol names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.comparison import functions
from optuna_lora_rl.learning.comparison import measured
from optuna_lora_rl.learning.comparison import networks
from optuna_lora_rl.learning.comparison import synthetic

if TYPE_CHECKING:
    from optuna_lora_rl.learning.comparison.problem import Problem
    from optuna_lora_rl.learning.comparison.protocol import Problems


def build(wanted: Problems) -> list[Problem]:
    """All problems of the named families.

    Raises:
        UserError: no table of the wanted split has been measured.
    """
    problems: list[Problem] = []
    if (tables := wanted.tables) is not None:
        problems += measured.table_problems(tables.split, list(tables.guises))
        if not problems:
            raise UserError(f"problems.tables: no table of the split {tables.split} is there")
    if wanted.synthetic is not None:
        problems += synthetic.synthetic_problems(wanted.synthetic.tasks, wanted.synthetic.seed)
    if (chosen := wanted.functions) is not None:
        last = chosen.first + chosen.instances
        problems += [
            functions.bbob_problem(family, dimensions, instance)
            for dimensions in chosen.dimensions
            for family in chosen.families
            for instance in range(chosen.first, last)
        ]
        problems += functions.classic_problems() if chosen.classics else []
    if (chosen_mixed := wanted.mixed) is not None:
        last = chosen_mixed.first + chosen_mixed.instances
        problems += [functions.mixed_problem(k) for k in range(chosen_mixed.first, last)]
    if wanted.networks is not None:
        problems += networks.network_problems()
    return problems
