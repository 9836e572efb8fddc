"""Pruners by name, with options checked and defaults that suit fine-tuning.

Four are our own. They judge a trial among all others, running ones too, and never stop it for a
difference that is within the evaluation's noise: ``async-halving``, ``peer-median``,
``cost-aware``, and, for studies with several objectives, ``pareto``. Their classes work in plain
Optuna as well, as ``optuna.create_study(pruner=pruners.PeerMedianPruner())``. The others are
Optuna's.

A fine-tuning run reports its score a handful of times: four, say. Studies of this package number
these evaluations 1, 2, 3, 4, so that trials of different batch sizes are compared at the same
share of their training; an objective of one's own may as well report under optimizer steps: 10,
20, 30, 40. Hence three differences from Optuna's defaults
for Optuna's pruners:

- ``median`` and ``percentile`` judge a trial only against at least three others that reported at
  the very same step (``n_min_trials``).
- ``successive-halving`` and ``hyperband`` start their first rung at the first evaluation, where
  ``create`` is told its step. Optuna's ``auto`` puts the rungs of a 40-step trial at 1, 4 and 16,
  so that one report at step 10 would have to win two halvings at once.
- their ``reduction_factor`` is 2, since four evaluations leave no room for factors of 3 or 4.

>>> from optuna_lora_rl import pruners
>>> pruners.create("median", {"n_startup_trials": 3}).__class__.__name__
'MedianPruner'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

import optuna

from optuna_lora_rl import by_name
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.pruners.async_halving import AsyncHalvingPruner
from optuna_lora_rl.pruners.cost_aware import CostAwarePruner
from optuna_lora_rl.pruners.pareto import SINGLE
from optuna_lora_rl.pruners.pareto import ParetoPruner
from optuna_lora_rl.pruners.pareto import report
from optuna_lora_rl.pruners.pareto import should_prune
from optuna_lora_rl.pruners.peer_median import PeerMedianPruner

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna.pruners import BasePruner

__all__ = [
    "NAMES",
    "AsyncHalvingPruner",
    "CostAwarePruner",
    "ParetoPruner",
    "PeerMedianPruner",
    "check",
    "create",
    "report",
    "should_prune",
]

_CLASSES: dict[str, Callable[..., BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "async-halving": AsyncHalvingPruner,
    "peer-median": PeerMedianPruner,
    "cost-aware": CostAwarePruner,
    "pareto": ParetoPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "successive-halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "threshold": optuna.pruners.ThresholdPruner,
    "patient": optuna.pruners.PatientPruner,
    "wilcoxon": optuna.pruners.WilcoxonPruner,
}
NAMES = tuple(_CLASSES)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "median": {"n_min_trials": 3},
    "percentile": {"percentile": 25.0, "n_min_trials": 3},
    "successive-halving": {"reduction_factor": 2},
    "hyperband": {"reduction_factor": 2},
    "patient": {"wrapped_pruner": "median", "patience": 1},
}

_AT_LEAST_0 = (0, float("inf"))
_AT_LEAST_1 = (1, float("inf"))
_LIMITS: dict[str, tuple[float, float]] = {
    "percentile": (0, 100),
    "n_startup_trials": _AT_LEAST_0,
    "n_warmup_steps": _AT_LEAST_0,
    "interval_steps": _AT_LEAST_1,
    "n_min_trials": _AT_LEAST_1,
    "min_resource": _AT_LEAST_1,
    "max_resource": _AT_LEAST_1,
    "reduction_factor": (2, float("inf")),
    "min_early_stopping_rate": _AT_LEAST_0,
    "bootstrap_count": _AT_LEAST_0,
    "patience": _AT_LEAST_0,
    "min_delta": _AT_LEAST_0,
    "p_threshold": (0, 1),
    "n_startup_steps": _AT_LEAST_0,
    "probability": (0, 1),
    "last_step": _AT_LEAST_1,
    "noise": _AT_LEAST_0,
}
# Which of a trial's steps a pruner is told, where the study knows them and the user says nothing.
_FIRST_STEP = {
    "successive-halving": "min_resource",
    "hyperband": "min_resource",
    "async-halving": "min_resource",
}
_LAST_STEP = {
    "hyperband": "max_resource",
    "async-halving": "last_step",
    "peer-median": "last_step",
    "cost-aware": "last_step",
    "pareto": "last_step",
}


def create(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
) -> BasePruner:
    """Return the pruner called ``name``.

    Args:
        name: one of ``NAMES``.
        options: keyword arguments of the pruner's class. For ``patient``, ``wrapped_pruner`` is
            another pruner's name, a mapping ``{name: ..., option: ...}``, or null for none.
        first_step: step under which a trial first reports, where that is known; the default of
            ``min_resource``.
        last_step: step under which a trial last reports, where that is known; the default of
            hyperband's ``max_resource`` and of ``last_step``.

    Raises:
        UserError: unknown name or option, wrong type, or a value out of range.
    """
    factory = by_name.choose("pruner", name, _CLASSES)
    subject = f"pruner {name!r}"
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"{subject}: options must be a mapping, but are {options!r}")
    chosen = dict(_DEFAULTS.get(name, {}))
    for keys, step in ((_FIRST_STEP, first_step), (_LAST_STEP, last_step)):
        if name in keys and step is not None:
            chosen[keys[name]] = step
    chosen |= options or {}
    given: dict[str, Any] = {}
    if name == "patient":
        wrapped = chosen.pop("wrapped_pruner")
        given["wrapped_pruner"] = _wrapped(wrapped, first_step=first_step, last_step=last_step)
    if name == "hyperband":
        _check_resources(subject, chosen)
    return by_name.build(subject, factory, chosen, given=given, limits=_LIMITS)


def check(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    n_objectives: int = 1,
    evaluations: int | None = None,
) -> None:
    """Say so where a pruner cannot work in the study that is about to start.

    Args:
        name: one of ``NAMES``.
        options: the pruner's options, as for ``create``.
        n_objectives: how many objectives the study has.
        evaluations: how often one trial reports, under the steps 1, 2, ..., where that is known.

    Raises:
        UserError: the pruner is for one objective and the study has several, or the other way
            round; or the pruner would wait until the trial is over; or ``wilcoxon``,
            ``cost-aware`` or ``pareto`` has too few evaluations to ever be sure before that.
    """
    pruner = create(name, options)
    if isinstance(pruner, optuna.pruners.NopPruner):
        return
    if n_objectives > 1 and not isinstance(pruner, ParetoPruner):
        raise UserError(
            f"pruner {name!r} cannot be used with {n_objectives} objectives; use pruner "
            "'pareto' or 'none', or one objective"
        )
    if n_objectives == 1 and isinstance(pruner, ParetoPruner):
        raise UserError(SINGLE)
    if evaluations is None:
        return
    for key in ("n_warmup_steps", "min_resource"):
        steps = (options or {}).get(key, 0)
        if isinstance(steps, int) and steps >= evaluations > 1:
            raise UserError(
                f"pruner {name!r}: option {key!r} is {steps}, but must be less than "
                f"{evaluations}: a step is an evaluation, and a trial has {evaluations}"
            )
    if isinstance(pruner, CostAwarePruner | ParetoPruner) and evaluations < 3:
        raise UserError(
            f"pruner {name!r} needs two evaluations before the last one, but a trial has only "
            f"{evaluations} in all; evaluate more often"
        )
    if isinstance(pruner, optuna.pruners.WilcoxonPruner):
        p_threshold = float((options or {}).get("p_threshold", 0.1))
        # The smallest one-sided p-value of n paired differences is 2^-n (all n worse).
        if 0.5 ** (evaluations - 1) >= p_threshold:
            raise UserError(
                f"pruner 'wilcoxon' cannot stop a trial of {evaluations} evaluations before its "
                f"last one at p_threshold {p_threshold:g}; evaluate more often, or use 'median'"
            )


def _wrapped(wrapped: Any, *, first_step: int | None, last_step: int | None) -> BasePruner | None:
    if wrapped is None:
        return None
    options: dict[str, Any] = {}
    if isinstance(wrapped, Mapping):
        options = dict(wrapped)
        if "name" not in options:
            raise UserError(
                f"pruner 'patient': wrapped_pruner is {wrapped!r}, but must have a key 'name'"
            )
        wrapped = options.pop("name")
    if wrapped == "pareto":
        raise UserError("pruner 'patient': wrapped_pruner cannot be 'pareto'")
    try:
        return create(wrapped, options, first_step=first_step, last_step=last_step)
    except UserError as error:
        raise UserError(f"pruner 'patient': wrapped_pruner: {error}") from error


def _check_resources(subject: str, options: Mapping[str, Any]) -> None:
    # Optuna computes a logarithm of the ratio at the first report, in the middle of a trial.
    low = options.get("min_resource", 1)
    high = options.get("max_resource", "auto")
    if isinstance(low, int) and isinstance(high, int) and high < low:
        raise UserError(
            f"{subject}: option 'max_resource' is {high}, but must be at least min_resource {low}"
        )
