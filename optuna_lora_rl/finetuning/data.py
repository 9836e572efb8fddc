"""The splits of a study: found or set aside, never overlapping, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.sources import Row

Kind = Literal["text", "prompt-completion", "messages"]
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Splits:
    """The examples of a study, each a row of its kind's columns, chats also of ``tools``.

    Attributes:
        kind: ``"text"``, ``"prompt-completion"`` or ``"messages"``.
        train: Examples to train on.
        validation: Examples that evaluations read; no content of theirs is in ``train``.
        test: Examples for the final best, or None where there are none; in neither of the others.
        overlapping: How many rows were left out because their content stood in another split.
        blank: How many rows were left out because a text was missing or empty.
    """

    kind: Kind
    train: list[Row]
    validation: list[Row]
    test: list[Row] | None
    overlapping: int = 0
    blank: int = 0


def load(options: DataOptions) -> Splits:
    """Reads the data and makes the splits.

    Raises:
        UserError: When data is missing, lacks columns, or leaves a split empty.
    """
    kind, train = _examples(options, options.train, "data.train", options.split)
    read = len(train)
    train = [row for row in train if _has_content(row)]
    blank = read - len(train)
    validation = _other(options, "validation", kind)
    test = _other(options, "test", kind)
    if validation is None:
        # Not before the test rows are out: they must not come back as validation.
        pool = without(train, test or [])
        validation, train = set_aside(pool, options.validation_fraction, options.seed)
        overlapping = read - blank - len(pool)
    else:
        known = len(train) + len(validation)
        validation = without(validation, test or [])
        train = without(train, [*validation, *(test or [])])
        overlapping = known - len(train) - len(validation)
    splits = Splits(
        kind=kind,
        train=draw(train, options.max_train_samples, options.seed),
        validation=draw(validation, options.max_validation_samples, options.seed),
        test=None if test is None else draw(test, options.max_test_samples, options.seed),
        overlapping=overlapping,
        blank=blank,
    )
    if not splits.train or not splits.validation:
        name = "training" if not splits.train else "validation"
        raise UserError(
            f"data.train: {options.train!r} leaves no example for {name}, after {overlapping} "
            f"whose content stands in another split and {blank} without text were left out"
        )
    return splits


def content(row: Row) -> str:
    """Returns what an example says, whatever its spacing: equal content is one example."""
    if "messages" in row:
        return json.dumps(_spaced(row["messages"]), sort_keys=True, ensure_ascii=False)
    parts = (row["text"],) if "text" in row else (row["prompt"], row["completion"])
    return "\x1f".join(str(_spaced(part)) for part in parts)


def turns(row: Row) -> list[dict[str, Any]]:
    """Returns the messages of a chat example, none of another."""
    if "messages" in row:
        return list(row["messages"])
    parts = (row.get("prompt"), row.get("completion"))
    return [turn for part in parts if isinstance(part, list) for turn in part]


def without(rows: Sequence[Row], excluded: Sequence[Row]) -> list[Row]:
    """Returns the rows whose content is not in ``excluded``."""
    out = {content(row) for row in excluded}
    return [row for row in rows if content(row) not in out]


def set_aside(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into validation and training by content.

    Args:
        rows: Examples, possibly repeated.
        fraction: Share of the *distinct* examples that goes to validation, at least one.
        seed: Decides which.

    Returns:
        The validation rows, each content once, and all rows with other content.

    Raises:
        UserError: When there are fewer than two distinct examples.
    """
    distinct = {content(row): row for row in reversed(rows)}
    if len(distinct) < 2:
        raise UserError(
            f"data.train has too few distinct examples, {len(distinct)}; at least 2 are needed to "
            "set one aside for validation"
        )
    count = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    chosen = set(sorted(distinct, key=lambda text: _lot(text, seed))[:count])
    validation = [distinct[text] for text in sorted(chosen, key=lambda text: _lot(text, seed))]
    return validation, [row for row in rows if content(row) not in chosen]


def draw(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Draws ``count`` rows by their content and the seed, in their old order."""
    if count is None or len(rows) <= count:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda index: (_lot(content(rows[index]), seed), index))
    return [rows[index] for index in sorted(order[:count])]


def fingerprint(rows: Sequence[Row]) -> str:
    """Returns a hash of the rows' exact contents and order."""
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _spaced(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_spaced(part) for part in value]
    if isinstance(value, dict):
        return {name: _spaced(part) for name, part in sorted(value.items())}
    return value


def _lot(text: str, seed: int) -> bytes:
    # By hash instead of a shuffle: an example keeps its side when others are added.
    return hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=16).digest()


def _other(options: DataOptions, name: str, kind: Kind) -> list[Row] | None:
    source: str | None = getattr(options, name)
    split: str | None = getattr(options, f"{name}_split")
    key = f"data.{name}"
    if source is None and split is None:
        own = (name, *sources.SPLIT_NAMES[name])
        if options.split in own or not sources.brings(options.train, name, options.subset):
            return None
        source, split = options.train, name
    elif source is None:
        source, key = options.train, f"data.{name}_split"
    default = name if sources.brings(source, name, options.subset) else "train"
    found, rows = _examples(options, source, key, split or default)
    if found != kind:
        raise UserError(
            f"{key}: {source!r} holds {found} examples, but data.train holds {kind} examples"
        )
    rows = [row for row in rows if _has_content(row)]
    if not rows:
        raise UserError(f"{key}: {source!r} has no example with text")
    return rows


def _examples(options: DataOptions, source: str, key: str, split: str) -> tuple[Kind, list[Row]]:
    if sources.is_file(source) and split != "train":
        raise UserError(
            f"{key}: {source!r} is one file and has no split {split!r}; name another file"
        )
    rows = sources.read(source, key=key, split=split, subset=options.subset)
    kind, columns = _kind(rows, source, key, options.columns)
    examples = [_example(row, columns, key, number) for number, row in enumerate(rows, 1)]
    _check_forms(examples, key)
    if any(row.get("tools") for row in rows) and any(map(turns, examples)):
        for example, row in zip(examples, rows, strict=True):
            example["tools"] = _tools(row["tools"]) if row.get("tools") else None
    return kind, examples


def _check_forms(examples: Sequence[Row], key: str) -> None:
    # TRL looks at the first example alone.
    seen: dict[str, int] = {}
    for number, example in enumerate(examples, 1):
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


def _tools(value: Any) -> str:
    # As JSON, which TRL reads: a table would give each tool the arguments of all.
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _kind(
    rows: list[Row], source: str, key: str, mapping: dict[str, str]
) -> tuple[Kind, dict[str, str]]:
    # Of all rows: a line of JSON may leave out what it has not.
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = {name for row in rows for name, value in row.items() if value is not None}
    for role, column in mapping.items():
        if column not in names:
            raise UserError(
                f"data.columns.{role}: {source!r} has no column {column!r}; it has {_names(names)}"
            )
    # A column that is there, but empty throughout, only where no other will do.
    for known in (filled, set(names)):
        for kind, roles in _COLUMNS.items():
            # A mapped role decides; a column that only happens to be called "text" does not.
            if mapping and not set(mapping) <= set(roles):
                continue
            columns = {role: mapping.get(role, role) for role in roles}
            if known.issuperset(columns.values()):
                return kind, columns
    raise UserError(
        f"{key}: {source!r} has the columns {_names(names)}; needed are 'text', or 'prompt' and "
        "'completion', or 'messages' (say with data.columns which column is which)"
    )


def _example(row: Row, columns: dict[str, str], key: str, number: int) -> Row:
    made = {}
    for role, column in columns.items():
        made[role] = _value(row.get(column), column, key, number)
        try:
            json.dumps(made[role], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            # JSON can spell half of a character; no tokenizer takes it.
            raise UserError(
                f"{key}: example {number} has half of a surrogate pair in the column {column!r}, "
                "which is no character"
            ) from None
    return made


def _value(value: Any, column: str, key: str, number: int) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return [_turn(turn, column, key, number) for turn in value]
    raise UserError(
        f"{key}: example {number} has {type(value).__name__} in the column {column!r}; it must be "
        "text, or a list of messages with 'role' and 'content'"
    )


def _turn(turn: dict[str, Any], column: str, key: str, number: int) -> dict[str, Any]:
    if "from" in turn and "value" in turn:
        # ShareGPT's words for the same thing.
        roles = {"human": "user", "gpt": "assistant"}
        turn = {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
    if not isinstance(turn.get("role"), str) or (
        "content" not in turn and not turn.get("tool_calls")
    ):
        raise UserError(
            f"{key}: example {number} has a message in the column {column!r} without 'role' and "
            "'content'"
        )
    # A message that only calls tools may say null; templates join text.
    said = "" if turn.get("content") is None else turn["content"]
    return {name: value for name, value in {**turn, "content": said}.items() if value is not None}


def _has_content(row: Row) -> bool:
    # A prompt may be empty; what is to be learnt may not.
    if row.get("prompt", "") is None:
        return False
    learnt = row["completion"] if "completion" in row else next(iter(row.values()))
    if not isinstance(learnt, list):
        return bool(learnt and learnt.strip())
    said = [turn for turn in learnt if turn["role"] == "assistant"] or learnt
    return any(turn.get("tool_calls") or str(turn["content"]).strip() for turn in said)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no columns"
