"""The reference of the YAML file, generated from the models that validate it.

``docs/configuration.md`` is the output of ``python -m optuna_lora_rl.study.reference``; a test
compares the two.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Union
from typing import get_args
from typing import get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from optuna_lora_rl import pruners
from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import model_files
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.study import checks
from optuna_lora_rl.study import reading
from optuna_lora_rl.study.spec import SHORT_FORMS
from optuna_lora_rl.study.spec import StudySpec
from optuna_lora_rl.vocabulary import VOCABULARY

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        name: The key.
        values: What values it takes, in words.
        default: Its default as YAML, or None where it has to be given.
        description: What it means.
        section: The model of the section that it opens, if it does.
    """

    name: str
    values: str
    default: str | None
    description: str
    section: type[BaseModel] | None


def keys(model: type[BaseModel]) -> Iterator[Key]:
    """The keys of a section, in the order of its model."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        section = kind if _is_section(kind) else None
        yield Key(name, words(kind), _default(field), field.description or "", section)


def words(annotation: Any) -> str:
    """A type in words, such as ``whole number, or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return ", or ".join(words(argument) for argument in arguments)
    if annotation is types.NoneType:
        return "`null`"
    if origin in (list, tuple):
        return f"list of {words(arguments[0])}"
    if origin is dict:
        return f"mapping of name to {words(arguments[1])}"
    if _is_section(annotation):
        return "section"
    return _PLAIN.get(annotation, str(annotation))


def as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def markdown() -> str:
    """The whole page."""
    parts = [_OPENING, _table(StudySpec)]
    parts += [
        f"## `{key.name}`\n\n{_opening(key.section)}\n\n{_table(key.section, key.name)}"
        for key in keys(StudySpec)
        if key.section
    ]
    parts += [_space(), _names()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(model: type[BaseModel], prefix: str = "") -> str:
    rows = [
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, key in _leaves(model, prefix):
        default = "required" if key.default is None else f"`{key.default}`"
        rows.append(f"| `{name}` | {key.values} | {default} | {_cell(key.description)} |")
    return "\n".join(rows)


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Key]]:
    """The keys of a section and, in a section's table, those of the sections inside it."""
    for key in keys(model):
        name = f"{prefix}.{key.name}" if prefix else key.name
        yield name, key
        if prefix and key.section:
            yield from _leaves(key.section, name)


def _opening(model: type[BaseModel] | None) -> str:
    return " ".join((model.__doc__ or "").split()) if model else ""


def _space() -> str:
    rows = "\n".join(
        f"| `{name}` | `{as_yaml(term.default)}` | {_cell(term.help)} |"
        for name, term in VOCABULARY.items()
    )
    return f"{_SPACE}\n\n| parameter | default | meaning |\n|---|---|---|\n{rows}"


def _names() -> str:
    return (
        "## Names\n\n"
        f"Samplers: {', '.join(f'`{name}`' for name in samplers.NAMES)}. "
        f"Pruners: {', '.join(f'`{name}`' for name in pruners.NAMES)}. Further keys in the "
        "`sampler` and `pruner` sections are arguments of the class, such as "
        "`sampler: {name: tpe, n_startup_trials: 5}`; `optuna-lora-rl validate` names what is "
        "allowed where one is not. `sampler: {name: rl, adapt: true}` lets the policy learn "
        "within the study, `{name: rl, weights: weights.safetensors}` takes one of your own, "
        "such as `optuna-lora-rl learn` writes."
    )


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    return as_yaml(value)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_OPENING = f"""# What a study's file may say

Generated by `python -m optuna_lora_rl.study.reference` from the models that validate the file.
`optuna-lora-rl init` writes a commented example, `optuna-lora-rl validate` checks a file, and
`--set key=value`, such as `--set budget.trials=5`, overrides a key for one command.

A section may be written as one value where it has one key that matters:
{", ".join(f"`{section}` (`{section}.{key}`)" for section, key in SHORT_FORMS.items())}.
Paths are relative to the folder where the command is run. Numbers such as `1e-4` are numbers.

What may change when a study goes on: `budget`, `sampler`, `transfer_from`, `pruner`, `packing`,
`output`, the trackers, and the ranges in `space`. Anything else would mix two problems in one
study and is refused with the difference named.
"""

_SPACE = """## `space`

For each parameter one of:

| form | meaning |
|---|---|
| `lora_rank: 16` | fixed |
| `lora_rank: [8, 16, 32]` or `{choices: [8, 16, 32]}` | one of these |
| `lora_rank: {low: 2, high: 64, log: true}` | a range, ends included; `step` for a grid |
| `lora_alpha: 2 * lora_rank` or `{ratio: 2, of: lora_rank}` | tied to another parameter |
| `lora_alpha: {ratio: {low: 0.5, high: 4, log: true}, of: lora_rank}` | a tuned ratio |

`truncate: {energy: 0.95}` and `truncate: {rank: 8}` stand for `truncate_energy: 0.95` and
`truncate_rank: 8`; what stands within may be any of these forms too.

`when` makes a parameter conditional: `use_dora: {choices: [true, false], when: {init_lora_weights:
[default]}}`. Where the condition does not hold, and where a parameter is not mentioned, it has its
default. Without a `space` the recommended one is searched: rank, alpha, learning rate, dropout
and target modules over the usual ranges; `defaults: true` beside other keys, as in
`{defaults: true, max_steps: 24}`, keeps it for what is not mentioned. A space in which nothing is
tuned is refused (but for a study of one trial), and a study ends when all configurations of a
space have been tried."""


_HEAD = """\
# A study of optuna_lora_rl. Check it:  optuna-lora-rl validate {file}
#                            Run it:    optuna-lora-rl run {file}
# Running it again goes on where it stopped. Keys that are commented out have their defaults.

"""

_SPACE_LINES = """\
# What is tuned. A range, a list of choices, a fixed value, or tied to another parameter;
# parameters that are not mentioned have their defaults (docs/configuration.md lists them all).
space:
  lora_rank: {low: 2, high: 64, log: true}
  lora_alpha: {ratio: {low: 0.5, high: 4, log: true}, of: lora_rank}
  learning_rate: {low: 1e-5, high: 1e-2, log: true}
  lora_dropout: {low: 0.0, high: 0.3}
  target_modules: [qv, attention, mlp, all-linear]
"""


def write_commented(file: Path, *, model: str, train: str, trials: int, force: bool) -> list[str]:
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
            blocks.append(_SPACE_LINES)
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


if __name__ == "__main__":
    print(markdown(), end="")
