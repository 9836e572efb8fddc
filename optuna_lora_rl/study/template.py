"""The commented file that ``optuna-lora-rl init`` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import model_files
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.study import checks
from optuna_lora_rl.study import reading
from optuna_lora_rl.study.reference import Key
from optuna_lora_rl.study.reference import as_yaml
from optuna_lora_rl.study.reference import keys
from optuna_lora_rl.study.spec import StudySpec

_HEAD = """\
# A study of optuna_lora_rl. Check it:  optuna-lora-rl validate {file}
#                            Run it:    optuna-lora-rl run {file}
# Running it again goes on where it stopped. Keys that are commented out have their defaults.

"""

_SPACE = """\
# What is tuned. A range, a list of choices, a fixed value, or tied to another parameter;
# parameters that are not mentioned have their defaults (docs/configuration.md lists them all).
space:
  lora_rank: {low: 2, high: 64, log: true}
  lora_alpha: {ratio: {low: 0.5, high: 4, log: true}, of: lora_rank}
  learning_rate: {low: 1e-5, high: 1e-2, log: true}
  lora_dropout: {low: 0.0, high: 0.3}
  target_modules: [qv, attention, mlp, all-linear]
"""


def write(file: Path, *, model: str, train: str, trials: int, force: bool) -> list[str]:
    """Writes the commented file.

    Returns:
        Sentences on what could not be checked.

    Raises:
        UserError: If there is no such model or data here, the file exists, unless ``force``, or
            it cannot be written.
    """
    options = reading.validate(ModelOptions, {"name": model}, "--model")
    reading.validate(DataOptions, {"train": train}, "--train")
    model_files.check(options)
    unseen = [model] if model_files.is_hub(options) else []
    if sources.is_hub(train):
        model_files.check_hub_name(train, "data.train", "data set")
        unseen.append(train)
    else:
        sources.read(train, key="data.train", split="train", limit=1)
    if file.exists() and not force:
        raise UserError(f"{file} exists; --force overwrites it")
    content = commented_file(
        file=str(file), name=file.stem, model=model, train=train, trials=trials
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return [checks.not_checked(name) for name in unseen]


def commented_file(*, file: str, name: str, model: str, train: str, trials: int) -> str:
    """A complete, valid YAML file with a comment on every key.

    Args:
        file: The file's name, for the commands in its head.
        name: The study's name.
        model: The base model.
        train: The training data.
        trials: How many trials.
    """
    said: dict[str, Any] = {
        "name": name,
        "model": {"name": model},
        "data": {"train": train},
        "training": {"evaluations": 4},
        "objective": {"metric": "loss", "cost_weight": 0.1},
        "sampler": {"name": "rl", "seed": 0},
        "pruner": {"name": "median"},
        "budget": {"trials": trials},
    }
    blocks = []
    for key in keys(StudySpec):
        if key.name == "space":
            blocks.append(_SPACE)
        elif key.section:
            blocks.append("".join(_section(key, said.get(key.name, {}), indent=0)))
        else:
            blocks.append("".join(_line(key, said, indent=0)))
    return _HEAD.format(file=file) + "\n".join(blocks)


def _section(key: Key, said: Mapping[str, Any], indent: int) -> Iterator[str]:
    assert key.section is not None
    yield from _comment(key.description, indent)
    active = bool(said)
    yield f"{' ' * indent}{'' if active else '# '}{key.name}:\n"
    yield from _keys(key.section, said, indent + 2)


def _keys(model: type[BaseModel], said: Mapping[str, Any], indent: int) -> Iterator[str]:
    for key in keys(model):
        if key.section and key.name in said:
            yield from _section(key, said[key.name], indent)
        else:
            yield from _line(key, said, indent)


def _line(key: Key, said: Mapping[str, Any], indent: int) -> Iterator[str]:
    yield from _comment(key.description, indent)
    if key.name in said:
        yield f"{' ' * indent}{key.name}: {as_yaml(said[key.name])}\n"
    else:
        yield f"{' ' * indent}# {key.name}: {key.default}\n"


def _comment(text: str, indent: int) -> Iterator[str]:
    for line in textwrap.wrap(text, width=96 - indent - 2):
        yield f"{' ' * indent}# {line}\n"
