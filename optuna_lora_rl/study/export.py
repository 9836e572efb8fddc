"""Takes a trial's configuration and adapter out of a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import card
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import report

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec


def chosen_trial(study: optuna.Study, number: int | None) -> FrozenTrial:
    """The trial with that number, or the best one.

    Raises:
        UserError: If there is no such trial, or none has been completed.
    """
    trials = study.get_trials(deepcopy=False)
    if number is None:
        best = outcome.best_of(trials)
        if best is None:
            raise UserError(f"the study {study.study_name!r} has no completed trial yet")
        return best
    trial = outcome.numbered(trials, number)
    if trial is None:
        has = f"trials 0 to {trials[-1].number}" if trials else "no trials yet"
        raise UserError(f"trial {number} does not exist; the study {study.study_name!r} has {has}")
    return trial


def to_peft(study: optuna.Study, spec: StudySpec, target: Path, number: int | None = None) -> str:
    """Writes the adapter of a trial as a PEFT folder.

    Where the trial's adapter is not on this machine, because it was not among the best, ran
    elsewhere or is damaged, only ``adapter_config.json`` is written, ready to train with.

    Args:
        study: The study.
        spec: Its file.
        target: A folder that does not exist or is empty.
        number: The trial; by default the best one.

    Returns:
        Why the weights are not there; empty where they are.

    Raises:
        UserError: If there is no such trial, the folder is not empty, or the ranks of its layers
            are on another machine.
    """
    trial = chosen_trial(study, number)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output: {target} exists and is not empty; choose another folder")
    source = adapters.place_of(spec.folder, trial.number)
    fault = adapters.fault_of(source) if source.exists() else "the weights were not kept"
    if not fault:
        shutil.copytree(source, target, dirs_exist_ok=True)
        (target / output.BEST_FILE).unlink(missing_ok=True)
        card.write(target, report.facts(study, spec, trial), spec)
    elif "configuration" not in trial.user_attrs:
        raise UserError(f"trial {trial.number} never got a configuration and cannot be exported")
    else:
        text = _peft_config(spec, trial)
        target.mkdir(parents=True, exist_ok=True)
        (target / adapters.CONFIG_FILE).write_text(text, encoding="utf-8")
    return fault


def _peft_config(spec: StudySpec, trial: FrozenTrial) -> str:
    """The trial's PEFT configuration for its own base model, as JSON."""
    from optuna_lora_rl.finetuning import lora
    from optuna_lora_rl.finetuning import model
    from optuna_lora_rl.finetuning.configuration import Configuration
    from optuna_lora_rl.finetuning.device import device_of
    from optuna_lora_rl.finetuning.quiet import quiet

    with quiet():
        # A GPU's attention kernel does not run here, and the modules are the same with any.
        options = spec.model.model_copy(update={"attn_implementation": None})
        base = model.load(options, device_of(use_cpu=True))
    configuration = Configuration.of(trial.user_attrs["configuration"])
    chosen = lora.targets_of(configuration, base.architecture, spec.target_sets)
    # Of each layer the rank it ended with, as in an adapter whose weights were kept.
    known = layers.read(trial, spec.folder)
    if known.missing and "ranks" in known.held:
        raise UserError(f"{known.missing}, and with them the ranks that the adapter needs")
    ranks = known.ranks or None
    peft = lora.lora_config(configuration, base.architecture, chosen, ranks, base.revision)
    config = peft.to_dict()
    config["base_model_name_or_path"] = base.name
    return json.dumps(config, indent=2, default=_jsonable, sort_keys=True) + "\n"


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
