"""The adapters on disk: one folder a trial, of which only the best trials' stay."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import outcome

if TYPE_CHECKING:
    import optuna

BEST_FILE = "best.json"
CONFIG_FILE = "adapter_config.json"
_OWNER = ".study"


def claim(output: Path, name: str) -> None:
    """Writes down whose adapters an output folder holds.

    Trials are told apart by their numbers alone, so that a second study would overwrite the
    adapters of the first.

    Raises:
        UserError: When they are another study's, or the folder cannot be written.
    """
    file = output / _OWNER
    try:
        output.mkdir(parents=True, exist_ok=True)
        owner = file.read_text(encoding="utf-8") if file.exists() else ""
        if not owner:
            file.write_text(name, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output is {str(output)!r}, but cannot be written: {error}") from error
    if owner not in ("", name):
        raise UserError(
            f"output is {str(output)!r}, which holds the adapters of the study {owner!r}; give "
            f"{name!r} a folder of its own"
        )


def folder_of(output: Path, number: int) -> Path:
    """Where the trial's adapter is saved."""
    return output / "adapters" / f"trial-{number:04d}"


def worth_keeping(study: optuna.Study) -> set[int]:
    """Numbers of the trials whose adapters stay: the best one, and the Pareto front."""
    best = outcome.best_of(study.get_trials(deepcopy=False))
    numbers = {best.number} if best else set()
    if len(study.directions) > 1:
        numbers |= {trial.number for trial in study.best_trials}
    return numbers


def drop_others(study: optuna.Study, output: Path) -> None:
    """Deletes the adapters of finished trials that are not among the best."""
    kept = worth_keeping(study)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in kept:
            shutil.rmtree(folder_of(output, trial.number), ignore_errors=True)


def publish_best(study: optuna.Study, output: Path, facts: dict[str, Any]) -> Path | None:
    """Copies the best trial's adapter to ``output/best``, with ``facts`` in ``best.json``.

    Returns:
        The folder, or None when the adapter is not on this machine.
    """
    best = outcome.best_of(study.get_trials(deepcopy=False))
    source = folder_of(output, best.number) if best else None
    if source is None or not (source / CONFIG_FILE).exists():
        return None
    target, fresh = output / "best", output / f".best-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    (fresh / BEST_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target
