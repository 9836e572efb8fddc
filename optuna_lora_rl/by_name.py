"""Pruners and samplers by name: options from a file, checked against the real signature.

The signature of the class that is built says which options there are and of which type, so a
newer Optuna brings its new options along. Options that a file cannot say (functions, other
samplers) are not offered.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import warnings
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

from optuna.exceptions import ExperimentalWarning

from optuna_lora_rl.errors import UserError

T = TypeVar("T")

# Annotations that a YAML file can say, and how an error names them.
_SAYABLE = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "None": "null",
    "dict": "a mapping",
    "Mapping": "a mapping",
}


def choose(kind: str, name: object, known: Mapping[str, T]) -> T:
    """Return what ``known`` has under ``name``.

    Raises:
        UserError: there is no such name; the sentence gives the nearest one and all of them.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    raise UserError(f"no {kind} is called {name!r}{_nearest(name, known)}; {_listed(known)}")


def build(
    subject: str,
    factory: Callable[..., T],
    options: Mapping[str, Any],
    *,
    given: Mapping[str, Any] | None = None,
    hidden: Collection[str] = (),
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> T:
    """Call ``factory`` with ``options`` once each has been checked.

    Args:
        subject: what an error sentence calls the thing, such as ``"pruner median"``.
        factory: the class; the annotations of its constructor say what is allowed.
        options: the user's keyword arguments.
        given: keyword arguments that were taken from elsewhere; ``options`` may not have them.
        hidden: options of the constructor that are not offered.
        limits: smallest and largest value by option, both included.

    Raises:
        UserError: unknown option, wrong type, or a value out of range.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"{subject}: options must be a mapping, but are {options!r}")
    given = given or {}
    sayable = sayable_options(factory)
    allowed: dict[str, list[str]] = {name: [] for name in given}
    allowed |= {option: sayable[option] for option in sayable if option not in hidden}
    if twice := given.keys() & options.keys():
        raise UserError(f"{subject}: option {min(twice)!r} is given twice")
    checked = {
        key: _check(subject, key, value, allowed, (limits or {}).get(key))
        for key, value in options.items()
    }
    try:
        with warnings.catch_warnings():
            # Whoever asks for it by name need not be told that its signature may change one day.
            warnings.simplefilter("ignore", ExperimentalWarning)
            return factory(**given, **checked)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error
    except (TypeError, ValueError) as error:
        # Rules that hold between options are known to the constructor alone.
        raise UserError(f"{subject}: {_one_sentence(error)}") from error


def sayable_options(factory: Callable[..., Any]) -> dict[str, list[str]]:
    """Return the options of ``factory`` that a file can say, each with its types.

    A type is one of the names in the signature (``"int"``, ``"None"``, ...) or a ``repr`` of an
    allowed literal value.
    """
    options = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        types = _sayable_types(text)
        if set(types) - {"None"}:
            options[name] = types
    return options


def _sayable_types(annotation: str) -> list[str]:
    # Optuna's annotations are strings whose names exist only while type checking, so they are
    # read, not evaluated.
    types: list[str] = []
    for part in _union(ast.parse(annotation, mode="eval").body):
        if isinstance(part, ast.Constant) and part.value is None:
            types.append("None")
        elif isinstance(part, ast.Name) and part.id in _SAYABLE:
            types.append(part.id)
        elif isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name):
            if part.value.id == "Literal":
                types += [repr(ast.literal_eval(n)) for n in _elements(part.slice)]
            elif part.value.id in _SAYABLE:
                types.append(part.value.id)
    return types


def _union(node: ast.expr) -> Iterable[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    else:
        yield node


def _elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _check(
    subject: str,
    key: str,
    value: Any,
    allowed: Mapping[str, list[str]],
    limit: tuple[float, float] | None,
) -> Any:
    if key not in allowed:
        raise UserError(
            f"{subject} has no option {key!r}{_nearest(key, allowed)}; {_listed(allowed)}"
        )
    types = allowed[key]
    wanted = f"{subject}: option {key!r} is {value!r}, but must be {_wanted(types, limit)}"
    for type_name in types:
        fits, converted = _convert(value, type_name)
        if fits:
            is_number = isinstance(converted, int | float) and not isinstance(converted, bool)
            if limit and is_number and not limit[0] <= converted <= limit[1]:
                raise UserError(wanted)
            return converted
    raise UserError(wanted)


def _convert(value: Any, type_name: str) -> tuple[bool, Any]:
    is_bool = isinstance(value, bool)
    match type_name:
        case "None":
            return value is None, value
        case "bool":
            return is_bool, value
        case "int":
            return isinstance(value, int) and not is_bool, value
        case "float":
            # YAML 1.1 reads 1e-3 (no dot) as a text.
            try:
                number = math.nan if is_bool or value is None else float(value)
            except (TypeError, ValueError):
                number = math.nan
            return not math.isnan(number), number
        case "str":
            return isinstance(value, str), value
        case "dict" | "Mapping":
            return isinstance(value, Mapping), value
        case literal:
            return repr(value) == literal, value


def _wanted(types: Iterable[str], limit: tuple[float, float] | None) -> str:
    said = " or ".join(dict.fromkeys(_SAYABLE.get(t, t) for t in types))
    if limit is None:
        return said
    low, high = limit
    if math.isinf(high):
        return f"{said}, at least {low:g}"
    return f"{said}, between {low:g} and {high:g}"


def _nearest(name: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _listed(known: Iterable[str]) -> str:
    names = ", ".join(known)
    return f"allowed: {names}" if names else "it has none"


def _one_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
