"""Reads a YAML file and says what is wrong with it, one sentence for each mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import TypeVar
from typing import get_args

import yaml
from pydantic import BaseModel
from pydantic import ValidationError

from optuna_lora_rl.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-4`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"line {key_node.start_mark.line + 1}: {key!r} is not a key name")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key} is given twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float, so that SafeLoader reads 1e-4 as a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that the file holds.

    Raises:
        UserError: If the file is missing, unreadable, or not a YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    content = _parse(text, str(path))
    if content is None:
        raise UserError(f"{path} is empty; `optuna-lora-rl init` writes a complete example")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_kind(content)}, not keys with values such as model: tiny")
    return content


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{source}{where}: this is not valid YAML ({problem})") from None


def override(
    content: dict[str, Any], assignments: Sequence[str], short: Mapping[str, str]
) -> None:
    """Puts each ``a.b=value`` into ``content``; the value is read as YAML.

    Args:
        content: What the file holds; changed in place.
        assignments: Such as ``budget.trials=5``.
        short: For each section that may be written as one value, the key that the value is for.

    Raises:
        UserError: If an assignment has no ``=`` or goes through a key that holds no section.
    """
    for assignment in assignments:
        keys, equals, value = assignment.partition("=")
        path = keys.strip().split(".")
        if not equals or not all(path):
            raise UserError(f"--set {assignment}: use key=value, such as --set budget.trials=5")
        section = content
        for depth, key in enumerate(path[:-1]):
            inner = section.setdefault(key, {})
            if depth == 0 and key in short and not isinstance(inner, dict):
                inner = section[key] = {short[key]: inner}
            if inner is None:
                inner = section[key] = {}
            if not isinstance(inner, dict):
                reached = ".".join(path[: depth + 1])
                raise UserError(f"--set {assignment}: {reached} is {inner!r} and has no keys")
            section = inner
        section[path[-1]] = _parse(value, f"--set {assignment}")


def expand(content: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """``content`` with every section that was written as one value written out."""
    return {
        key: {short[key]: value}
        if key in short and value is not None and not isinstance(value, dict)
        else value
        for key, value in content.items()
    }


def validate(model: type[Model], content: Mapping[str, Any], source: str) -> Model:
    """``content`` as a ``model``.

    Args:
        model: The pydantic model that says what is allowed.
        content: Keys and values.
        source: The file's name, for the message.

    Raises:
        UserError: Naming every mistake, one line each.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        mistakes = [sentence(model, dict(mistake)) for mistake in error.errors()]
    mistakes = list(dict.fromkeys(mistakes))
    if len(mistakes) == 1:
        raise UserError(f"{source}: {mistakes[0]}")
    lines = "".join(f"\n  - {mistake}" for mistake in mistakes)
    raise UserError(f"{source} has {len(mistakes)} mistakes:{lines}")


def sentence(model: type[BaseModel], mistake: Mapping[str, Any]) -> str:
    """One pydantic error in words that name the key, the value and what is allowed."""
    location = tuple(part for part in mistake["loc"] if not _is_union_branch(part))
    key = ".".join(str(part) for part in location)
    if mistake["type"] == "extra_forbidden":
        return _unknown_key(model, location)
    if mistake["type"] == "missing":
        return f"{key} is missing; it has to be given"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        # A model's own sentences begin with their key as the section knows it.
        if location and re.match(rf"{re.escape(str(location[-1]))}[ .]", message):
            return ".".join([*map(str, location[:-1]), message])
        return f"{key}: {message}" if key else message
    if mistake["type"] in {"model_type", "dict_type"}:
        return f"{key} is {mistake['input']!r}, but must hold keys with values"
    wanted = message.replace("Input should be", "must be").replace("a valid ", "a ")
    for technical, plain in _PLAIN.items():
        wanted = wanted.replace(technical, plain)
    return f"{key} is {mistake['input']!r}, but {wanted}"


_PLAIN = {
    "a integer": "a whole number",
    "an integer": "a whole number",
    "a boolean": "true or false",
    "a string": "text",
    "a list": "a list",
    "a dictionary": "keys with values",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
    "String should have at least 1 character": "must not be empty",
}


def _is_union_branch(part: int | str) -> bool:
    """Pydantic names the tried branch of a union in the location; people do not write it."""
    return isinstance(part, str) and (
        part in {"str", "int", "float", "bool", "none"} or "[" in part
    )


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    key = ".".join(str(part) for part in location)
    known = sorted(_section(model, location[:-1]).model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{key} is not a known key; {hint}"


def _section(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        nested = [annotation, *get_args(annotation)]
        model = next(t for t in nested if isinstance(t, type) and issubclass(t, BaseModel))
    return model


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only {value!r}"
