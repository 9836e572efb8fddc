"""Ask and tell: the study's sampler for runs that happen elsewhere, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from typing import TYPE_CHECKING
from typing import Any

from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.errors import quoted
from optuna_lora_rl.errors import shortened
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study.owner import OWNER
from optuna_lora_rl.study.storage import database_errors

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec

_KEYS = {"trial", "value", "values", "state", "reason"}
TOLD = "told"


def ask(spec: StudySpec, count: int) -> Generator[str, None, None]:
    """Yields ``count`` new configurations, each a line of JSON.

    Raises:
        UserError: If the storage cannot be used, or the study is another problem's.
    """
    with database_errors(spec.storage_url), opening.quiet():
        study = opening.open_study(spec, heartbeat=False)
        opening.enqueue_guides(study, spec)
        for _ in range(count):
            trial = study.ask()
            if OWNER in trial.user_attrs:
                # A worker tried for it at the same moment, and came too late.
                trial.set_user_attr(OWNER, None)
            configuration = opening.propose(spec, trial)
            yield json.dumps(
                {"trial": trial.number, "params": trial.params, "configuration": configuration}
            )


def tell(spec: StudySpec, said: str) -> str:
    """Finishes a trial that was asked for.

    Args:
        spec: The study.
        said: A JSON object with ``trial`` and one of ``value``, ``values`` and ``state``
            (``"fail"``, then with an optional ``reason``).

    Returns:
        What was recorded, as a line of JSON.

    Raises:
        UserError: If the object is not like that, or the trial is not waiting for a result.
    """
    content = _parse(said)
    with database_errors(spec.storage_url):
        study = opening.load_study(spec)
        trial = _waiting(study.get_trials(deepcopy=False), content["trial"])
        storage = study._storage
        if content.get("state") == "fail":
            reason = shortened(masked(str(content.get("reason", "told to have failed"))))
            storage.set_trial_user_attr(trial._trial_id, outcome.FAILURE, TOLD)
            storage.set_trial_user_attr(trial._trial_id, outcome.MESSAGE, reason)
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, _values(content, len(study.directions)))
        told = storage.get_trial(trial._trial_id)
    return json.dumps({"trial": told.number, "state": told.state.name, "values": told.values})


def _parse(said: str) -> dict[str, Any]:
    try:
        content = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the result is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("trial"), int):
        raise UserError(
            'the result must be a JSON object such as {"trial": 3, "value": 0.42}, not '
            + quoted(said)
        )
    unknown = sorted(content.keys() - _KEYS)
    if unknown:
        raise UserError(f"the result has an unknown key {unknown[0]}; known are {sorted(_KEYS)}")
    if content.get("state", "fail") != "fail":
        raise UserError(
            f"state is {quoted(content['state'])}; the only state to tell is fail, all else "
            "is a value"
        )
    return content


def _values(content: dict[str, Any], n_objectives: int) -> list[float]:
    values: Any = content["values"] if "values" in content else [content.get("value")]
    right = isinstance(values, list) and len(values) == n_objectives
    if not right or not all(_is_finite(value) for value in values):
        wanted = (
            "value must be a number"
            if n_objectives == 1
            else (f"values must be a list of {n_objectives} numbers")
        )
        raise UserError(f"{wanted}, not {quoted(values[0] if right else values)}")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _waiting(trials: list[FrozenTrial], number: int) -> FrozenTrial:
    trial = outcome.numbered(trials, number)
    if trial is None:
        raise UserError(f"trial {number} does not exist; the study has {len(trials)} trials")
    if trial.state != TrialState.RUNNING:
        raise UserError(f"trial {number} is already {trial.state.name.lower()}")
    if outcome.is_running(trial):
        raise UserError(f"trial {number} was not asked for: a worker is running it")
    return trial
