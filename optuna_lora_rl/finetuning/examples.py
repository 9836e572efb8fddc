"""What a row of data says: which columns hold the example, and the example in TRL's words.

Nothing that a row says is left out without a word: what cannot be learnt is refused with the row's
number, and columns that are not read are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import chats
from optuna_lora_rl.finetuning.chats import is_missing
from optuna_lora_rl.finetuning.chats import says
from optuna_lora_rl.finetuning.files import Row

Kind = Literal["text", "prompt-completion", "messages"]
_ROLES: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
# Read where they are there.
_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "prompt-completion": ("input", "system", "tools"),
    "text": (),
}
# Columns by which an example is known, the first that are there.
_KNOWN: tuple[tuple[Kind, dict[str, str]], ...] = (
    ("messages", {"messages": "messages"}),
    ("prompt-completion", {"prompt": "prompt", "completion": "completion"}),
    ("text", {"text": "text"}),
    ("messages", {"messages": "conversations"}),
    ("prompt-completion", {"prompt": "instruction", "completion": "output"}),
    ("prompt-completion", {"prompt": "instruction", "completion": "response"}),
)
# Alpaca's and Dolly's name for what an instruction is about.
_INPUTS = ("input", "context")
# Of KTO's rows, in TRL and in LLaMA-Factory.
_LABELS = ("label", "kto_tag")
_PREFERENCE = ("chosen", "rejected")


@dataclass(frozen=True)
class Form:
    """How rows are read.

    Attributes:
        kind: ``"text"``, ``"prompt-completion"`` or ``"messages"``.
        columns: The column of each role, those that examples are made of.
        unread: Other columns that say something, which no example holds.
    """

    kind: Kind
    columns: Mapping[str, str]
    unread: tuple[str, ...]


def form_of(rows: Sequence[Row], source: str, key: str, mapping: Mapping[str, str]) -> Form:
    """Finds out which columns hold the examples.

    Args:
        rows: All rows: a line of JSON may leave out what it has not.
        source: Where they are from, for messages.
        key: The option that named it.
        mapping: Columns by role, as the user said.

    Raises:
        UserError: When the columns make no example.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = {name for row in rows for name, value in row.items() if not is_missing(value)}
    saying = {name for row in rows for name, value in row.items() if says(value)}
    for role, column in mapping.items():
        if column not in names:
            raise UserError(
                f"data.columns.{role}: {source!r} has no column {column!r}; it has {_names(names)}"
            )
    # A column that is there, but empty throughout, only where no other will do.
    for there in (filled, set(names)):
        found = _found(there, mapping)
        if found is not None:
            kind, columns = found
            further = _optional(kind, columns, there, mapping)
            if kind == "prompt-completion" and not _are_chats(rows, columns["prompt"]):
                # Plain text has no place for them.
                further.pop("tools", None)
            columns = {**columns, **further}
            used = set(columns.values())
            unread = tuple(name for name in names if name in saying and name not in used)
            return Form(kind, columns, unread)
    hint = "say with data.columns which column is which"
    if set(_PREFERENCE) <= set(names):
        hint = "preference pairs are not learnt as such: name the good answers in data.columns"
    raise UserError(
        f"{key}: {source!r} has the columns {_names(names)}; needed are 'text', or 'prompt' and "
        f"'completion', or 'messages' ({hint})"
    )


def examples(rows: Sequence[Row], form: Form, key: str) -> list[Row]:
    """Makes an example of each row.

    Args:
        rows: The rows of a source.
        form: How they are read.
        key: The option that named the source, for messages.

    Returns:
        Rows of the kind's columns, None where a cell is missing; chats also of ``tools``, as JSON,
        where any has some.

    Raises:
        UserError: When a row holds what cannot be learnt, with its number.
    """
    rows = _with_whole_numbers(rows, form)
    made = [_example(row, form, f"{key}: example {n}") for n, row in enumerate(rows, 1)]
    _check_alike(made, key)
    column = form.columns.get("tools")
    are_chats = any(isinstance(value, list) for row in made for value in row.values())
    if column is not None and are_chats:
        tools = [
            chats.tools(row.get(column), f"{key}: example {number}")
            for number, row in enumerate(rows, 1)
        ]
        if any(tools):
            for example, its in zip(made, tools, strict=True):
                example["tools"] = its
    return made


def _are_chats(rows: Sequence[Row], column: str) -> bool:
    return any(isinstance(row.get(column), list) for row in rows)


def _found(there: set[str], mapping: Mapping[str, str]) -> tuple[Kind, dict[str, str]] | None:
    for kind, known in _KNOWN:
        # A mapped role decides; a column that only happens to be called "text" does not.
        if not set(mapping) <= {*_ROLES[kind], *_OPTIONAL[kind]}:
            continue
        columns = {role: mapping.get(role, column) for role, column in known.items()}
        if there.issuperset(columns.values()):
            return kind, columns
    return None


def _optional(
    kind: Kind, columns: Mapping[str, str], there: set[str], mapping: Mapping[str, str]
) -> dict[str, str]:
    found = {}
    for role in _OPTIONAL[kind]:
        named: tuple[str, ...] = (role,)
        if role == "input":
            named = _INPUTS if columns["prompt"] == "instruction" else ()
        own = [name for name in named if name in there and name not in columns.values()]
        if role in mapping or own:
            found[role] = mapping.get(role) or own[0]
    return found


def _with_whole_numbers(rows: Sequence[Row], form: Form) -> Sequence[Row]:
    """Makes whole numbers again of what pandas made floats of, since some cells are missing."""
    for column in form.columns.values():
        cells = [row.get(column) for row in rows]
        numbers = [cell for cell in cells if isinstance(cell, float) and not is_missing(cell)]
        has_gaps = any(map(is_missing, cells))
        if has_gaps and numbers and all(number.is_integer() for number in numbers):
            rows = [
                {**row, column: int(cell)}
                if isinstance(cell, float) and not is_missing(cell)
                else row
                for row, cell in zip(rows, cells, strict=True)
            ]
    return rows


def _example(row: Row, form: Form, where: str) -> Row:
    _check_meaning(row, form, where)
    columns = form.columns
    made = {
        role: _value(row.get(columns[role]), role, columns[role], where)
        for role in _ROLES[form.kind]
    }
    if "input" in columns:
        made["prompt"] = _with_input(made["prompt"], row.get(columns["input"]), columns, where)
    if "system" in columns:
        _add_system(made, row.get(columns["system"]), columns["system"], where)
    for role, value in made.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            # JSON can spell half of a character; no tokenizer takes it.
            raise UserError(
                f"{where} has half of a surrogate pair in the column {columns[role]!r}, which is "
                "no character"
            ) from None
    return made


def _check_meaning(row: Row, form: Form, where: str) -> None:
    """Refuses what says that the rest of the row is not to be learnt, or not as text alone."""
    others = {name: value for name, value in row.items() if name in form.unread}
    for name in chats.MEDIA:
        if says(others.get(name)):
            raise UserError(
                f"{where} has something in the column {name!r}, but only text is learnt here; "
                "take such rows out, or the column where the text stands for itself"
            )
    if chats.counts_nothing(others):
        raise UserError(
            f"{where} has the weight {others['weight']!r}, but all rows count the same; take such "
            "rows out, and the column"
        )
    for name in _LABELS:
        # A class's number is no label of this kind.
        is_unwanted = others.get(name) is False or others.get(name) in ("False", "false")
        if form.kind != "text" and is_unwanted:
            raise UserError(
                f"{where} has the {name} false: its answer is not wanted, and would be learnt "
                "like all others; take such rows out, and the column"
            )


def _value(value: Any, role: str, column: str, where: str) -> Any:
    if is_missing(value):
        return None
    if role == "messages" and isinstance(value, str):
        value = chats.parsed(value, column, where)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        # As JSON spells them: true, 1, 0.5.
        return json.dumps(value)
    is_chat = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if is_chat and role != "text":
        return chats.turns(value, column, where)
    allowed = "text" if role == "text" else "text, or a list of messages with 'role' and 'content'"
    raise UserError(
        f"{where} has {type(value).__name__} in the column {column!r}; it must be {allowed}"
    )


def _with_input(prompt: Any, given: Any, columns: Mapping[str, str], where: str) -> Any:
    said = _value(given, "text", columns["input"], where)
    if said is None or not said.strip():
        return prompt
    if isinstance(prompt, list):
        raise UserError(
            f"{where} has a chat in the column {columns['prompt']!r}, to which the text of the "
            f"column {columns['input']!r} cannot be added"
        )
    return said if prompt is None else f"{prompt}\n{said}"


def _add_system(made: Row, given: Any, column: str, where: str) -> None:
    said = _value(given, "text", column, where)
    if said is None or not said.strip():
        return
    role = next(iter(made))
    opening = made[role]
    if not isinstance(opening, list):
        if opening is not None:
            raise UserError(
                f"{where} has a system message in the column {column!r}, but is no chat that "
                "could begin with it; write its text into the prompt, or take the column out"
            )
        return
    if not opening or opening[0]["role"] != "system":
        made[role] = [{"role": "system", "content": said}, *opening]
    elif opening[0]["content"].strip() != said.strip():
        raise UserError(
            f"{where} has two system messages, one in the column {column!r} and another one in "
            "its chat"
        )


def _check_alike(made: Sequence[Row], key: str) -> None:
    # TRL looks at the first example alone.
    seen: dict[str, int] = {}
    for number, example in enumerate(made, 1):
        for value in example.values():
            if value is not None:
                seen.setdefault("messages" if isinstance(value, list) else "text", number)
    if len(seen) == 2:
        (form, one), (other, another) = seen.items()
        where = "" if one == another else f"example {another} has "
        raise UserError(
            f"{key}: example {one} has {form} and {where}{other}; all prompts and completions "
            "must be of one form"
        )


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no columns"
