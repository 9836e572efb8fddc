"""The problems that a protocol names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from studies.comparison import functions
from studies.comparison import measured
from studies.comparison import networks
from studies.comparison import synthetic
from studies.comparison.importing import imported
from studies.comparison.problem import Problem

if TYPE_CHECKING:
    from studies.comparison.protocol import Problems


def build(wanted: Problems) -> list[Problem]:
    """All problems of the named families.

    Raises:
        UserError: no table of the wanted split has been measured, or an import cannot be had.
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
    for path in wanted.import_ or ():
        problems += _imported(path)
    return problems


def _imported(path: str) -> list[Problem]:
    found = imported("problems.import", path)
    found = found() if callable(found) else found
    problems = [found] if isinstance(found, Problem) else found
    if not isinstance(problems, list) or not all(isinstance(one, Problem) for one in problems):
        raise UserError(f"problems.import: {path} gives neither a Problem nor a list of them")
    return problems
