"""What a trial records of its layers: a file of the study's folder, too large for its database.

A model of 210 adapted layers makes 40 kB of it a trial, and every look at a study reads all that
the database holds of it. The trial keeps the file's hash. Earlier versions kept all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.study import output as output_folder
from optuna_lora_rl.study import owner
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.finetuning.trial import TrialResult

# The trial's attribute: `sha256` of its file, and what that `holds`.
ATTRIBUTE = "layers"
# What the file may hold, and earlier versions kept as attributes.
HELD = ("ranks", "rank_changes", "monitor")


@dataclass(frozen=True)
class Layers:
    """What is known here of a trial's layers.

    Attributes:
        ranks: As :class:`~optuna_lora_rl.finetuning.trial.TrialResult` has them.
        rank_changes: The same.
        monitor: The same.
        missing: What of them is not here and why, in a sentence; empty where all is.
        held: Names of what was recorded, be it here or not.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    rank_changes: list[dict[str, Any]] = field(default_factory=list)
    monitor: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    held: frozenset[str] = frozenset()


def file_of(output: Path, number: int) -> Path:
    """The file of a trial; it stays where the trial's adapter is dropped."""
    return output / "layers" / f"trial-{number:04d}.json"


def keep(output: Path, number: int, result: TrialResult) -> dict[str, Any]:
    """Writes the file of a trial, whole or not at all, unless there is nothing to write.

    Returns:
        The attribute that the trial keeps.
    """
    known = {name: getattr(result, name) for name in HELD if getattr(result, name)}
    if not known:
        return {}
    file, text = file_of(output, number), wording.json_text(known)
    file.parent.mkdir(parents=True, exist_ok=True)
    output_folder.write(file, text, output)
    return {ATTRIBUTE: {"sha256": _hash(text.encode()), "holds": list(known)}}


def read(trial: FrozenTrial, output: Path) -> Layers:
    """Reads what there is here of a trial's layers."""
    kept = trial.user_attrs.get(ATTRIBUTE)
    if kept is None:
        known = {name: trial.user_attrs[name] for name in HELD if name in trial.user_attrs}
        return Layers(**known, held=frozenset(known))
    file, held = file_of(output, trial.number), frozenset(kept["holds"])
    try:
        content = file.read_bytes()
    except OSError as error:
        if not file.exists() and not owner.is_here(trial, output) and owner.where(trial):
            why = f"on the machine that ran it, in {owner.where(trial)}"
        else:
            why = f"lost: {file} cannot be read ({error.strerror})"
        return Layers(missing=f"the layers of trial {trial.number} are {why}", held=held)
    if _hash(content) != kept["sha256"]:
        why = f"lost: {file} is not what the trial wrote"
        return Layers(missing=f"the layers of trial {trial.number} are {why}", held=held)
    return Layers(**json.loads(content, object_hook=_numbers), held=held)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    # JSON has no word for what is no number; all of these values are one.
    return {name: math.nan if value is None else value for name, value in found.items()}
