"""Stops a run whose end will be dominated, in studies with several objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import optuna

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.pruners.cost_aware import ForecastPruner
from optuna_lora_rl.pruners.cost_aware import forecast
from optuna_lora_rl.pruners.peers import gathered
from optuna_lora_rl.pruners.peers import others

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial

    from optuna_lora_rl.pruners.peers import Peers


# System attribute of one report: this and the step.
REPORTED = "reported:"


class ParetoPruner(ForecastPruner):
    """Stop a trial whose plausible end is dominated by a finished trial.

    Each objective is extrapolated to the last step as ``CostAwarePruner`` does it; one that no
    trial ever moved, such as a cost that is counted beforehand, is known exactly. The plausible
    end is the best that the trial may come to: in each objective the value that it exceeds with
    ``probability`` only, and never less than the noise above what is expected. If a finished
    trial is at least as good in every objective and better in one, the trial cannot be expected
    to extend the front, and is stopped. (Optimistic corners of forecasts are how Pareto active
    learning discards points: Zuluaga et al. 2013, ICML, "PAL".) That finished trial must have been
    as good at the same step already: who leads is not stopped by a forecast.

    Optuna has no reports for several objectives, so the objective reports and asks by
    ``pruners.report`` and ``pruners.should_prune``, which also serve studies with one.

    >>> import optuna
    >>> from optuna_lora_rl import pruners
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(
    ...     directions=["maximize", "minimize"], pruner=pruners.ParetoPruner()
    ... )
    >>> def objective(trial):
    ...     end, cost = trial.suggest_float("end", 0, 1), trial.suggest_float("cost", 0, 2)
    ...     for step in range(1, 9):
    ...         pruners.report(trial, (end - 0.3 / step, cost), step)
    ...         if pruners.should_prune(trial):
    ...             raise optuna.TrialPruned
    ...     return end - 0.3 / 8, cost
    >>> for end, cost in ((0.5, 0.2), (0.6, 0.5), (0.8, 1.0), (0.9, 1.5), (0.4, 1.2), (0.4, 0.1)):
    ...     study.enqueue_trial({"end": end, "cost": cost})
    >>> study.optimize(objective, n_trials=6)
    >>> study.trials[4].state.name, study.trials[5].state.name
    ('PRUNED', 'COMPLETE')

    Args:
        probability: How improbable an end must be, in one objective, not to be plausible.
        n_startup_trials: Finished trials before anybody is judged.
        n_warmup_steps: Reports at steps before this one are not judged.
        last_step: The step at which trials end; by default the last step of the finished trials.
        noise: Standard deviation of one evaluation of the objectives that change during a run;
            ``"auto"`` estimates it from the study's curves, for each objective by itself.

    Raises:
        ValueError: An argument is out of range.
    """

    # An end that is as probable as not is plausible.
    _highest = 0.5

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Judge a trial by its reports so far.

        Raises:
            UserError: The study has one objective.
        """
        if len(study.directions) == 1:
            raise UserError(SINGLE)
        by_objective = _peers_of(study, trial)
        peers = by_objective[0]
        if not peers.own:
            return False
        if not all(np.isfinite(each.own[peers.step]) for each in by_objective):
            return True
        end = self._end(peers, len(peers.ended))
        if end is None or not all(each.is_curve for each in by_objective):
            return False
        twice = zip(*(each.twice() for each in by_objective), strict=True)
        return all(self._dominated(each, end) for each in twice)

    def _dominated(self, by_objective: Sequence[Peers], last_step: int) -> bool:
        """Whether a finished trial is ahead now, and will be ahead of the best plausible end."""
        from scipy.special import ndtri

        finished = by_objective[0].feasible[by_objective[0].complete]
        all_as_good, any_better = finished, np.zeros(len(finished), dtype=bool)
        for peers in by_objective:
            ahead = forecast(peers, last_step, self._noise)
            z = float(-ndtri(self._probability)) if self._probability > 0 else math.inf
            margin = max(
                z * ahead.deviation if ahead.deviation else 0.0, math.sqrt(2) * ahead.noise
            )
            plausible = ahead.mean + margin
            as_good_now = ~(ahead.finished_now < ahead.now)
            all_as_good = all_as_good & as_good_now & (ahead.finished_end >= plausible)
            any_better |= ahead.finished_end > plausible
        return bool(np.any(all_as_good & any_better))


SINGLE = "pruner 'pareto' needs several objectives; with one objective use 'cost-aware'"


def _peers_of(study: Study, trial: FrozenTrial) -> list[Peers]:
    """A trial and its peers, once for each objective."""
    trials = others(study, trial)
    own, theirs = _reported(trial), [_reported(other) for other in trials]
    peers = []
    for column, direction in enumerate(study.directions):
        reports = [{step: values[column] for step, values in of.items()} for of in theirs]
        mine = {step: values[column] for step, values in own.items()}
        peers.append(gathered(mine, trials, reports, direction))
    return peers


def _reported(trial: FrozenTrial) -> dict[int, list[float]]:
    return {
        int(key.removeprefix(REPORTED)): values
        for key, values in trial.system_attrs.items()
        if key.startswith(REPORTED)
    }


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
