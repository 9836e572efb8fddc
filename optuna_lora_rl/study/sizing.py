"""What quality is left of an adapter when it is made smaller, on a study's validation set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.study import fine_tuner
from optuna_lora_rl.study import opening

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec


def qualities(spec: StudySpec, adapter: Path, on_activity: OnActivity = unseen) -> list[float]:
    """Evaluates a saved adapter, cut to each share of its energy.

    Args:
        spec: Whose model, data and metric.
        adapter: Folder of the adapter.
        on_activity: Told how far it is.

    Returns:
        The qualities, in the order of :func:`optuna_lora_rl.rank.truncation.sizes`.

    Raises:
        UserError: When model, data or adapter cannot be had, or do not go together.
    """
    opening.claim(spec)
    tuner = fine_tuner.make(spec, cache=spec.folder / "cache", on_activity=on_activity)
    return tuner.cut(adapter)
