"""What a study leaves in its folder: the best adapter and the report, as the trials stand."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import dashboard
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import report
from optuna_lora_rl.study.adapters import Best
from optuna_lora_rl.study.opening import claim
from optuna_lora_rl.study.opening import quiet
from optuna_lora_rl.study.outcome import Usage

if TYPE_CHECKING:
    import optuna

    from optuna_lora_rl.study.spec import StudySpec


def write(study: optuna.Study, spec: StudySpec) -> Best:
    """Brings ``best``, the report and the dashboard's notes up to date.

    Returns:
        The best adapter that there is.
    """
    # What is read and what is written belong together, also where two workers end at once.
    with quiet(), output.lock(spec.folder):
        adapters.drop_others(study, spec.folder)
        best = adapters.publish_best(study, spec)
        if any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            report.write(study, spec, lost=best.lost)
            dashboard.annotate(study, spec)
        return best


def restore(study: optuna.Study, spec: StudySpec) -> None:
    """Writes what is missing, where the last worker was killed before it had written it."""
    trials = study.get_trials(deepcopy=False)
    best = outcome.best_of(trials)
    if best is None or report.UNTUNED not in study.user_attrs or Usage.of(trials).running:
        return
    there = adapters.best_there(trials, spec.folder).trial
    lacks_best = there is not None and adapters.best_number(spec.folder) != there.number
    if lacks_best or not (spec.folder / report.FILE).exists():
        # Who may only read the folder is shown the study all the same.
        with suppress(UserError, OSError):
            claim(spec)
            write(study, spec)
