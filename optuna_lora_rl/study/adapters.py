"""The adapters on disk: one folder a trial, of which only the best trials' stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import card
from optuna_lora_rl.study import front
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output as output_folder
from optuna_lora_rl.study import owner
from optuna_lora_rl.study import report
from optuna_lora_rl.study.output import BEST_FILE

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec


CONFIG_FILE = "adapter_config.json"


def folder_of(output: Path, number: int) -> Path:
    """Where the trial's adapter is saved."""
    return output / "adapters" / f"trial-{number:04d}"


@dataclass(frozen=True)
class Best:
    """The best adapter that there is.

    Attributes:
        trial: Whose it is, or None where there is none on this machine.
        folder: Where it is.
        lost: Why it is not that of the best trial, in a sentence; empty where it is.
    """

    trial: FrozenTrial | None = None
    folder: Path | None = None
    lost: str = ""


def best_there(trials: Iterable[FrozenTrial], output: Path) -> Best:
    """Finds the best trial's adapter, or the best of those that are whole where it is lost."""
    lost = ""
    for trial in outcome.ranked(trials):
        folder = place_of(output, trial.number)
        fault = fault_of(folder)
        if not fault:
            instead = f"{lost}; best/ holds that of trial {trial.number}" if lost else ""
            return Best(trial, folder, instead)
        if not lost:
            if not folder.exists() and not owner.is_here(trial, output):
                return Best()
            lost = f"the adapter of trial {trial.number}, the best, is lost ({fault})"
    return Best(lost=lost)


def place_of(output: Path, number: int) -> Path:
    """Where a trial's adapter is: its own folder, or ``best`` where only that copy is whole."""
    own, copied = folder_of(output, number), output / "best"
    if best_number(output) == number and fault_of(own) and not fault_of(copied):
        return copied
    return own


def fault_of(folder: Path) -> str:
    """Why a folder holds no adapter that can be loaded, in words; empty where it does."""
    from optuna_lora_rl.rank import saved

    try:
        saved.check(folder)
    except UserError as error:
        return str(error)
    return ""


def drop_others(study: optuna.Study, output: Path) -> None:
    """Deletes the adapters of finished trials but those that are shown at the end.

    They are the best one's, the Pareto front's, and that of the guides' configuration.
    """
    # Another worker may be copying one of them.
    with output_folder.lock(output):
        # Read once: a trial that another worker ends meanwhile, perhaps the best, is judged later.
        trials = study.get_trials(deepcopy=False)
        best = (outcome.best_of(trials), best_there(trials, output).trial)
        shown = (*best, outcome.guides_of(trials), *front.front(study))
        kept = {trial.number for trial in shown if trial}
        for trial in trials:
            if trial.state.is_finished() and trial.number not in kept:
                shutil.rmtree(folder_of(output, trial.number), ignore_errors=True)


def publish_best(study: optuna.Study, spec: StudySpec) -> Best:
    """Copies the best adapter to ``best``, with what is known of it in ``best.json``.

    Returns:
        What is in ``best`` now.

    Raises:
        UserError: When ``best`` is nothing that a study made.
    """
    with output_folder.lock(spec.folder):
        output_folder.check_best(spec.folder)
        there = best_there(study.get_trials(deepcopy=False), spec.folder)
        if there.trial is None or there.folder is None:
            return there
        facts, target = report.facts(study, spec, there.trial), spec.folder / "best"
        with output_folder.place(target) as fresh:
            shutil.copytree(there.folder, fresh)
            card.write(fresh, facts, spec)
            text = json.dumps(facts, indent=2) + "\n"
            (fresh / BEST_FILE).write_text(text, encoding="utf-8")
    return replace(there, folder=target)


def best_number(output: Path) -> int | None:
    """Number of the trial whose adapter lies in ``best``; None where there is none."""
    try:
        facts = json.loads((output / "best" / BEST_FILE).read_text(encoding="utf-8"))
        return int(facts["trial"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    source = place_of(spec.folder, trial.number)
    fault = fault_of(source) if source.exists() else "the weights were not kept"
    if not fault:
        shutil.copytree(source, target, dirs_exist_ok=True)
        (target / BEST_FILE).unlink(missing_ok=True)
        card.write(target, report.facts(study, spec, trial), spec)
    elif "configuration" not in trial.user_attrs:
        raise UserError(f"trial {trial.number} never got a configuration and cannot be exported")
    else:
        text = _peft_config(spec, trial)
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).write_text(text, encoding="utf-8")
    return fault


def _peft_config(spec: StudySpec, trial: FrozenTrial) -> str:
    """The trial's PEFT configuration for its own base model, as JSON."""
    from optuna_lora_rl.finetuning import lora
    from optuna_lora_rl.finetuning import model
    from optuna_lora_rl.finetuning.configuration import Configuration
    from optuna_lora_rl.finetuning.device import device_of
    from optuna_lora_rl.finetuning.isolation import quiet

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
