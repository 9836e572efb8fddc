"""The problem that a study solves, so that two different ones never mix in one study.

Scores compare only where model, data, training, objective and the fixed parameters are the same.
They are stored with the study when it begins and compared when it goes on. Budget, sampler,
pruner, packing, storage and output may change at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna.distributions import check_distribution_compatibility
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution

from optuna_lora_rl import tiny
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import content
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.vocabulary import DEFAULTS

if TYPE_CHECKING:
    import optuna

    from optuna_lora_rl.study.spec import StudySpec

PROBLEM = "problem"
TUNED = "tuned"
# What changes neither a trial's training nor its score.
_IRRELEVANT = {"training.monitor", "training.report_to", "objective.objectives"}
_ANOTHER = "choose another study name or storage"
_CHUNK_BYTES = 1 << 20
# Before the digest of what is read of a folder.
_READ = "read:"


def describe(spec: StudySpec) -> dict[str, Any]:
    """The problem as flat keys, such as ``objective.cost_weight``, with JSON values."""
    flat = _flat(
        {
            "model": spec.model.model_dump(mode="json"),
            "data": spec.data.model_dump(mode="json"),
            "training": spec.training.model_dump(mode="json"),
            "objective": spec.objective.model_dump(mode="json"),
            "target_sets": spec.target_sets,
            "space": spec.lora_space().fixed(),
        }
    )
    flat |= {f"{key} (content)": digest for key, digest in _contents(spec)}
    # What once was a mean over batches, with all that the training loss has in it.
    flat["objective.loss"] = "cross-entropy, mean over tokens"
    return flat


def _defaults() -> dict[str, Any]:
    """The problem's keys at what each means where it is not said."""
    return _flat(
        {
            "model": ModelOptions().model_dump(mode="json"),
            "data": DataOptions(train="left out").model_dump(mode="json", exclude={"train"}),
            "training": TrainingOptions().model_dump(mode="json"),
            "objective": ObjectiveOptions().model_dump(mode="json"),
            "target_sets": {},
            "space": DEFAULTS,
        }
    )


def adopt(study: optuna.Study, spec: StudySpec) -> None:
    """Stores the problem with a new study, or checks that an old one has the same.

    Raises:
        UserError: As ``check`` does.
    """
    new, tuned = check(study, spec)
    if study.user_attrs.get(PROBLEM) != new:
        study.set_user_attr(PROBLEM, new)
    if study.user_attrs.get(TUNED, {}) != tuned:
        study.set_user_attr(TUNED, tuned)


def check(study: optuna.Study, spec: StudySpec) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks that a study with trials has the problem of the file.

    Returns:
        The problem, and the distributions of what is tuned, as they are stored.

    Raises:
        UserError: Naming every key that differs, with what it was and what it is now.
    """
    new = describe(spec)
    tuned = {
        name: distribution_to_json(distribution)
        for name, distribution in spec.lora_space().distributions().items()
    }
    old, old_tuned = study.user_attrs.get(PROBLEM), study.user_attrs.get(TUNED, {})
    # Before the first trial nothing can mix, and what was wrong in the file may be put right.
    if study.get_trials(deepcopy=False):
        if old is None:
            raise UserError(
                f"the study {spec.name!r} in this storage was begun by another program; {_ANOTHER}"
            )
        differences = [
            *_differences(old, new, tuned=set(tuned), formerly_tuned=set(old_tuned)),
            *_changed_choices(old_tuned, tuned),
        ]
        if differences:
            raise UserError(
                "; ".join(differences)
                + f": scores of the study {spec.name!r} would not compare; {_ANOTHER}"
            )
    return new, tuned


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, tuned: set[str], formerly_tuned: set[str]
) -> Iterator[str]:
    defaults = _defaults()
    # A version that had no such key did what the key's default does.
    old = {**_without(defaults, formerly_tuned), **old}
    new = {**_without(defaults, tuned), **new}
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key.endswith("(content)"):
            if before and now and before.startswith(_READ) != now.startswith(_READ):
                # Of a version that took a folder's digest otherwise.
                continue
            section = key.split()[0]
            yield f"the content of {new.get(section)} ({section}) has changed"
        elif key in old and key in new:
            yield f"{key} was {before!r} and is now {now!r}"
        elif _is_tuned(key, formerly_tuned):
            yield f"{key} was tuned and is now fixed at {now!r}"
        elif _is_tuned(key, tuned):
            yield f"{key} was fixed at {before!r} and is now tuned"
        elif key in old:
            # Also a key of an older version of the package that no longer exists.
            yield f"{key} was {before!r} and is now gone"
        else:
            yield f"{key} was not set and is now {now!r}"


def _without(defaults: Mapping[str, Any], tuned: set[str]) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if not _is_tuned(key, tuned)}


def _is_tuned(key: str, tuned: set[str]) -> bool:
    parameter = key.removeprefix("space.")
    return parameter in tuned or f"{parameter}_ratio" in tuned


def _changed_choices(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Tuned parameters that Optuna cannot continue; ranges may move freely."""
    for name in sorted(old.keys() & new.keys()):
        before, now = json_to_distribution(old[name]), json_to_distribution(new[name])
        try:
            check_distribution_compatibility(before, now)
        except ValueError:
            yield (
                f"space.{name} was {_words(before)} and is now {_words(now)} (a running study's "
                "ranges may move, its choices and scales may not)"
            )


def _words(distribution: Any) -> str:
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return f"a choice of {', '.join(map(str, choices))}"
    scale = "a log" if distribution.log else "a linear"
    kind = type(distribution).__name__.removesuffix("Distribution").lower()
    return f"{scale} {kind} range"


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys and their values as JSON gives them back, without what is irrelevant."""
    flat = {key: value for key, value in _flatten(sections) if key not in _IRRELEVANT}
    return dict(json.loads(json.dumps(flat)))


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contents(spec: StudySpec) -> Iterator[tuple[str, str]]:
    """Digests of what is read of local files and folders, by the keys that name them."""
    name = spec.model.name
    if name in tiny.MODELS:
        # Another version of the package may have other weights in its built-in models.
        yield "model.name", _of_file(tiny.MODELS[name] / "model.safetensors")
    elif Path(name).expanduser().is_dir():
        yield "model.name", _READ + content.of_model(Path(name).expanduser())
    read = data.files_read(spec.data)
    for key, said in (
        ("data.train", spec.data.train),
        ("data.validation", spec.data.validation),
        ("data.test", spec.data.test),
    ):
        if said is None or said not in read:
            continue
        folder = Path(said).expanduser()
        if folder.is_dir():
            sums = [f"{file.relative_to(folder)} {_of_file(file)}\n" for file in read[said]]
            yield key, _READ + hashlib.sha256("".join(sums).encode()).hexdigest()[:16]
        elif folder.is_file():
            yield key, _of_file(folder)


def _of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:16]
