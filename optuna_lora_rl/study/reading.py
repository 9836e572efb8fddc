"""Reads a YAML file and says what is wrong with it, one sentence for each mistake."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import TypeVar
from typing import get_args

import yaml
from pydantic import BaseModel
from pydantic import ValidationError

from optuna_lora_rl.errors import MOST_SAID
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import quoted
from optuna_lora_rl.errors import shortened

Model = TypeVar("Model", bound=BaseModel)


# A study's file has some kilobytes; the limits keep a file that was made to harm, or named by
# mistake, from taking minutes or all memory.
_MOST_BYTES = 1 << 18
_MOST_NODES = 20_000
_DEEPEST = 40
_LONGEST_NUMBER = 40
_LARGEST = 2**63
# Characters of a mistake that is not the only one.
_MOST_OF_MANY = 160
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null")}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-4`` is a number, and a key given twice is an error.

    Whatever is nested too deeply, or grows too large by aliases of aliases, is refused while it is
    read.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        # For each node that is complete: how many it holds, and how deeply.
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        line = self.peek_event().start_mark.line + 1
        self._check(line, self._nodes, self._depth)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            inner = [self._sizes[id(child)] for child in _children(node)]
            size = 1 + sum(s for s, _ in inner), 1 + max((d for _, d in inner), default=0)
            self._check(line, *size)
            self._sizes[id(node)] = size
        elif id(node) not in self._sizes:
            raise UserError(f"line {line}: an alias (*) stands within what it stands for")
        return node

    def _check(self, line: int, nodes: int, depth: int) -> None:
        if nodes > _MOST_NODES:
            raise UserError(f"line {line}: the file holds more than {_MOST_NODES:,} values")
        if depth > _DEEPEST:
            raise UserError(f"line {line}: values are nested more than {_DEEPEST} deep")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        line = node.start_mark.line + 1
        kind = node.tag.removeprefix(_TAG)
        if node.tag not in _SCALARS:
            raise UserError(f"line {line}: the tag {quoted(node.tag)} is not used in these files")
        if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
            raise UserError(f"line {line}: a number of {len(node.value):,} characters is too long")
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError):
            raise UserError(f"line {line}: {quoted(node.value)} is no {kind}") from None
        if kind == "int" and not -_LARGEST <= value < _LARGEST:
            raise UserError(f"line {line}: the number {quoted(node.value)} is too large")
        if kind == "str" and (found := _UNPRINTABLE.search(value)):
            raise UserError(f"line {line}: a text holds the character {found[0]!a}")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UserError(f"line {line}: {quoted(key)} is not a key name")
            if key in seen:
                raise UserError(f"line {line}: the key {key} is given twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _children(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        yield from itertools.chain.from_iterable(node.value)


# A date is text as any other, and is told from a number where one is wanted.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a dot in a float, so that SafeLoader reads 1e-4 as a string.
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that the file holds.

    Raises:
        UserError: If the file is missing, unreadable, too large, or not a YAML mapping.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            # Not by its size: a pipe or a device has none.
            content = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(
            f"{path} is larger than {_MOST_BYTES >> 10} KiB, so it is no study's file; data go "
            "into files of their own"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    parsed = _parse(text, str(path))
    if parsed is None:
        raise UserError(f"{path} is empty; `optuna-lora-rl init` writes a complete example")
    if not isinstance(parsed, dict):
        held = "a list" if isinstance(parsed, list) else f"only {quoted(parsed)}"
        raise UserError(f"{path} holds {held}, not keys with values such as model: tiny")
    return parsed


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    except yaml.reader.ReaderError as error:
        found = ascii(chr(error.character))
        raise UserError(f"{source}: this is not valid YAML (it holds {found})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or "unreadable"
        if problem.startswith("but") and error.context:
            problem = f"{error.context}, {problem}"
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
        if not equals or not all(path) or len(path) > _DEEPEST:
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
                raise UserError(f"--set {assignment}: {reached} is {_kind(inner)} and has no keys")
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
    raise UserError(listed(f"{source} has {len(mistakes)} mistakes:", mistakes))


def listed(heading: str, mistakes: Sequence[str]) -> str:
    """Several mistakes as one message, a line each; cut where they are too long or too many."""
    text = heading
    for number, mistake in enumerate(mistakes):
        line = f"\n  - {shortened(mistake, _MOST_OF_MANY)}"
        if len(text) + len(line) > MOST_SAID - _MOST_OF_MANY // 2:
            return f"{text}\n  - and {len(mistakes) - number} more"
        text += line
    return text


def sentence(model: type[BaseModel], mistake: Mapping[str, Any]) -> str:
    """One pydantic error in words that name the key, the value and what is allowed."""
    location = tuple(part for part in mistake["loc"] if not _is_union_branch(part))
    if mistake["type"] == "extra_forbidden":
        # The last part is the writer's own word, whatever it looks like.
        *_, unknown = mistake["loc"]
        where = location[:-1] if location[-1:] == (unknown,) else location
        return _unknown_key(model, where, str(unknown))
    key = ".".join(str(part) for part in location)
    if mistake["type"] == "missing":
        return f"{key} is missing; it has to be given"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        # A model's own sentences begin with their key as the section knows it.
        if location and re.match(rf"{re.escape(str(location[-1]))}[ .]", message):
            return ".".join([*map(str, location[:-1]), message])
        return f"{key}: {message}" if key else message
    if mistake["type"] in {"model_type", "dict_type"}:
        return f"{key} is {_kind(mistake['input'])}, but must hold keys with values"
    wanted = message.replace("Input should be", "must be").replace("a valid ", "a ")
    for technical, plain in _PLAIN.items():
        wanted = wanted.replace(technical, plain)
    return f"{key} is {_kind(mistake['input'])}, but {wanted}"


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
        part in {"str", "int", "float", "bool", "none"} or "[" in part or part[:1].isupper()
    )


def _unknown_key(model: type[BaseModel], section: tuple[int | str, ...], unknown: str) -> str:
    key = ".".join(str(part) for part in (*section, unknown))
    known = sorted(_section(model, section).model_fields)
    close = difflib.get_close_matches(unknown, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{key} is not a known key; {hint}"


def _section(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        # A number is the place in a list, whose elements the annotation of its key describes.
        if isinstance(part, str):
            model = next(_models(model.model_fields[part].annotation))
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation, such as a union, speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _kind(value: Any) -> str:
    """A value as a message quotes it: of what may hold anything, the kind alone."""
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else quoted(value)
