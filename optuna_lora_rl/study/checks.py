"""What can be checked of a study before anything is loaded, written or trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import trackers

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec


def require(spec: StudySpec) -> None:
    """Refuses a study that cannot run here.

    Raises:
        UserError: Naming every obstacle, one line each.
    """
    from optuna_lora_rl.finetuning import device

    found = trackers.obstacles(spec.training.report_to)
    elsewhere = device.obstacle(spec.model, spec.training)
    found += [elsewhere] if elsewhere else []
    if found:
        raise UserError("\n".join(found))
