"""Reports and judgements for studies with any number of objectives.

Optuna's ``trial.report`` and ``trial.should_prune`` refuse studies with several objectives. Here
one pair of functions serves both: with one objective they are Optuna's own; with several each
report is a short list of numbers in the trial's system attributes, one for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import optuna

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.pruners.pareto import REPORTED
from optuna_lora_rl.pruners.pareto import ParetoPruner

if TYPE_CHECKING:
    from optuna.trial import Trial


def report(trial: Trial, values: float | Sequence[float], step: int) -> None:
    """Say where a trial stands.

    >>> import optuna
    >>> from optuna_lora_rl import pruners
    >>> study = optuna.create_study(
    ...     directions=["maximize", "minimize"], pruner=pruners.ParetoPruner()
    ... )
    >>> trial = study.ask()
    >>> pruners.report(trial, (0.4, 1.5), step=1)
    >>> pruners.should_prune(trial)
    False

    Args:
        trial: The running trial.
        values: What every objective would be if the trial ended now.
        step: Any whole number that grows: evaluations, optimizer steps, epochs.

    Raises:
        UserError: There are more or fewer values than objectives, or the step is no whole number,
            at least 0.
    """
    given = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    objectives = len(trial.study.directions)
    if len(given) != objectives:
        raise UserError(
            f"report: {len(given)} values were given, but the study has {objectives} objectives"
        )
    if step != int(step) or step < 0:
        raise UserError(f"report: step is {step!r}, but must be a whole number, at least 0")
    if objectives == 1:
        trial.report(given[0], int(step))
    else:
        key = f"{REPORTED}{int(step)}"
        trial.study._storage.set_trial_system_attr(trial._trial_id, key, given)


def should_prune(trial: Trial) -> bool:
    """Whether the study's pruner would stop a trial now.

    Raises:
        UserError: The study has several objectives, and a pruner that knows only one.
    """
    study = trial.study
    if len(study.directions) == 1:
        return trial.should_prune()
    if isinstance(study.pruner, optuna.pruners.NopPruner):
        return False
    if not isinstance(study.pruner, ParetoPruner):
        raise UserError(
            f"{type(study.pruner).__name__} cannot judge {len(study.directions)} objectives; "
            "create the study with pruner=ParetoPruner() or pruner=optuna.pruners.NopPruner()"
        )
    return study.pruner.prune(study, study._storage.get_trial(trial._trial_id))
