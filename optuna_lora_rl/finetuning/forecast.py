"""What a trial will take, from two steps of a typical one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.trial import Trial
from optuna_lora_rl.finetuning.trial import TrialRequest

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.workspace import Workspace
    from optuna_lora_rl.vocabulary import Value


@dataclass(frozen=True)
class Forecast:
    """What a typical trial takes that runs to its end, alone.

    Attributes:
        seconds: Time of its steps and evaluations.
        evaluating: Seconds of that for evaluations.
        peak_bytes: Peak memory: CUDA's allocation, or the process's resident memory.
    """

    seconds: float
    evaluating: float
    peak_bytes: int


def measure(
    workspace: Workspace, typical: Mapping[str, Value], on_activity: OnActivity
) -> Forecast:
    """Trains two steps, reads what the last evaluation reads, and scales both up.

    Args:
        workspace: What all runs share; left as it was.
        typical: Parameters of a typical run.
        on_activity: Told how far it is.

    Raises:
        FineTuningError: When such a run fails.
    """
    wanted = Configuration.of(typical)
    plan = sft.Plan.of(wanted, workspace.training, len(workspace.prepared.lengths))
    moments: list[tuple[str, float]] = []

    def tells(activity: Activity) -> None:
        if activity.what == "training":
            moments.append(("step", time.monotonic()))
        on_activity(replace(activity, what=f"measuring two steps: {activity.what}"))

    request = TrialRequest(
        0,
        {**typical, "max_steps": min(2, plan.steps)},
        report=lambda *_: moments.append(("evaluation", time.monotonic())),
        on_activity=tells,
    )
    took = Trial(workspace, request).alone()
    # The last step, which is no longer the first, and the evaluation of everything after it.
    before, step, evaluated = moments[-3:] if len(moments) > 2 else [moments[0], *moments]
    last, rows = evaluated[1] - step[1], workspace.rows_read
    evaluating = last * sum(rows) / rows[-1]
    seconds = plan.steps * (step[1] - before[1] or took.seconds - last)
    return Forecast(seconds + evaluating, evaluating, took.peak_bytes)
