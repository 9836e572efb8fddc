"""The splits of a study: found or set aside, never overlapping, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import examples
from optuna_lora_rl.finetuning import sources
from optuna_lora_rl.finetuning.examples import Form
from optuna_lora_rl.finetuning.examples import Kind
from optuna_lora_rl.finetuning.files import Row
from optuna_lora_rl.finetuning.options import GENERATED_METRICS
from optuna_lora_rl.finetuning.options import MOST_VALIDATED
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a split; each row that was read is in one of the others.

    Attributes:
        read: Rows of the source; of a validation set that was set aside, what was set aside.
        blank: Left out because nothing is to be learnt, or there is no prompt.
        unanswered: Chats left out because no turn of theirs is an assistant's.
        overlapping: Left out because their content stands in another split.
        set_aside: Taken out of the training rows for validation.
        repeated: Left out of what was set aside because their content stands there already.
        undrawn: Left out because no more were asked for.
        used: What is left, before tokenising.
        duplicated: Of those, how many repeat another's content.
    """

    read: int
    blank: int = 0
    unanswered: int = 0
    overlapping: int = 0
    set_aside: int = 0
    repeated: int = 0
    undrawn: int = 0
    used: int = 0
    duplicated: int = 0


@dataclass(frozen=True)
class Splits:
    """The examples of a study, each a row of its kind's columns, chats also of ``tools``.

    Attributes:
        kind: ``"text"``, ``"prompt-completion"`` or ``"messages"``.
        train: Examples to train on.
        validation: Examples that evaluations read; no content of theirs is in ``train``.
        test: Examples for the final best, or None where there are none; in neither of the others.
        counts: What became of the rows, by split.
        unread: Columns of the training data that say something and are in no example.
    """

    kind: Kind
    train: list[Row]
    validation: list[Row]
    test: list[Row] | None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def overlapping(self) -> int:
        """How many rows were left out because their content stood in another split."""
        return sum(counts.overlapping for counts in self.counts.values())

    @property
    def blank(self) -> int:
        """How many rows were left out because there was nothing to learn from them."""
        return sum(counts.blank + counts.unanswered for counts in self.counts.values())


def load(options: DataOptions) -> Splits:
    """Reads the data and makes the splits.

    Raises:
        UserError: When data is missing, lacks columns, or leaves a split empty.
    """
    form, rows = _examples(options, options.train, "data.train", options.split)
    train, counts = _told(rows)
    validation = _other(options, "validation", form.kind)
    test = _other(options, "test", form.kind)
    known = {"train": counts}
    if test is not None:
        test, known["test"] = _told(test)
        _check_some(test, "test", options)
    if validation is None:
        # Not before the test rows are out: they must not come back as validation.
        pool = without(train, test or [])
        validation, rest = set_aside(pool, options.validation_fraction, options.seed, counts)
        taken = len(pool) - len(rest)
        known["train"] = replace(counts, overlapping=len(train) - len(pool), set_aside=taken)
        known["validation"] = Counts(read=taken, repeated=taken - len(validation))
        train = rest
    else:
        validation, own = _told(validation)
        _check_some(validation, "validation", options)
        separate = without(validation, test or [])
        known["validation"] = replace(own, overlapping=len(validation) - len(separate))
        validation, whole = separate, len(train)
        train = without(train, [*validation, *(test or [])])
        known["train"] = replace(counts, overlapping=whole - len(train))
    drawn = {"train": train, "validation": validation, **({} if test is None else {"test": test})}
    for name, all_rows in drawn.items():
        most = getattr(options, f"max_{name}_samples")
        most = MOST_VALIDATED if most == "auto" else most
        drawn[name] = draw(all_rows, most, options.seed)
        known[name] = _used(known[name], all_rows, drawn[name])
    splits = Splits(
        kind=form.kind,
        train=drawn["train"],
        validation=drawn["validation"],
        test=drawn.get("test"),
        counts={name: known[name] for name in drawn},
        unread=form.unread,
    )
    if not splits.train or not splits.validation:
        name = "training" if not splits.train else "validation"
        raise UserError(
            f"data.train: {options.train!r} leaves no example for {name}, after "
            f"{splits.overlapping} whose content stands in another split and {splits.blank} "
            "without text were left out"
        )
    return splits


def look(options: DataOptions, count: int = 64) -> dict[str, Form]:
    """Reads the first rows of each source that is on this machine, and says what they are.

    Args:
        options: The sources; what lies on the hub is not fetched.
        count: How many rows are read, more only where these make no example.

    Returns:
        The form of the examples by option, such as ``data.train``.

    Raises:
        UserError: As ``load`` does of these rows.
    """
    found: dict[str, Form] = {}
    for name in ("train", "validation", "test"):
        named = _source_of(options, name)
        if named is None or sources.is_hub(named[0]):
            continue
        source, split, key = named
        try:
            form, _ = _examples(options, source, key, split, count)
        except UserError:
            # A column may begin further down.
            form, _ = _examples(options, source, key, split)
        _check_kind(form.kind, found.get("data.train", form).kind, source, key)
        found[f"data.{name}"] = form
    return found


def check_metric(kind: Kind, objective: ObjectiveOptions) -> None:
    """Raises ``UserError`` where the metric needs answers, and the examples have none."""
    if objective.metric in GENERATED_METRICS and kind == "text":
        raise UserError(
            f"objective.metric: {objective.metric} compares answers, but text examples ask "
            "nothing; take loss or token_accuracy, or prompt/completion data"
        )


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


def set_aside(
    rows: Sequence[Row], fraction: float, seed: int, counts: Counts | None = None
) -> tuple[list[Row], list[Row]]:
    """Splits rows into validation and training by content.

    Args:
        rows: Examples, possibly repeated.
        fraction: Share of the *distinct* examples that goes to validation, at least one.
        seed: Decides which.
        counts: What was left out before, for the message.

    Returns:
        The validation rows, each content once, and all rows with other content.

    Raises:
        UserError: When there are fewer than two distinct examples.
    """
    distinct = {content(row): row for row in reversed(rows)}
    if len(distinct) < 2:
        left_out = "" if counts is None else _left_out(counts)
        raise UserError(
            f"data.train has too few distinct examples, {len(distinct)}; at least 2 are needed to "
            f"set one aside for validation{left_out}"
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
    # Keys in their order: a template writes a call's arguments as they come.
    text = json.dumps(list(rows), ensure_ascii=False, default=str)
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


def files_read(options: DataOptions) -> dict[str, list[Path]]:
    """The local files that ``load`` reads, by the source that they belong to."""
    found: dict[str, list[Path]] = {}
    for name in ("train", "validation", "test"):
        named = _source_of(options, name)
        if named is None:
            continue
        source, split, key = named
        # What is missing is said where it is read.
        with suppress(UserError, OSError, ValueError, KeyError, TypeError):
            files = sources.files_of(source, key=key, split=split, subset=options.subset)
            found.setdefault(source, []).extend(files)
    return found


def _source_of(options: DataOptions, name: str) -> tuple[str, str, str] | None:
    """A split's source, its split there, and the option that named it; None where it has none."""
    if name == "train":
        return options.train, options.split, "data.train"
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
    return source, split or default, key


def _other(options: DataOptions, name: str, kind: Kind) -> list[Row] | None:
    named = _source_of(options, name)
    if named is None:
        return None
    source, split, key = named
    form, rows = _examples(options, source, key, split)
    _check_kind(form.kind, kind, source, key)
    return rows


def _check_kind(kind: Kind, of_train: Kind, source: str, key: str) -> None:
    if kind != of_train:
        raise UserError(
            f"{key}: {source!r} holds {kind} examples, but data.train holds {of_train} examples"
        )


def _examples(
    options: DataOptions, source: str, key: str, split: str, limit: int | None = None
) -> tuple[Form, list[Row]]:
    if sources.is_file(source) and split != "train":
        raise UserError(
            f"{key}: {source!r} is one file and has no split {split!r}; name another file"
        )
    rows = sources.read(source, key=key, split=split, subset=options.subset, limit=limit)
    form = examples.form_of(rows, source, key, options.columns)
    return form, examples.examples(rows, form, key)


def _check_some(rows: list[Row], name: str, options: DataOptions) -> None:
    if not rows:
        named = _source_of(options, name)
        source, _, key = named or ("", "", f"data.{name}")
        raise UserError(f"{key}: {source!r} has no example with text")


def _told(rows: list[Row]) -> tuple[list[Row], Counts]:
    """The rows that teach something, and how many do not."""
    lacking = [_lacks(row) for row in rows]
    return (
        [row for row, lack in zip(rows, lacking, strict=True) if lack is None],
        Counts(len(rows), lacking.count("blank"), lacking.count("unanswered")),
    )


def _lacks(row: Row) -> str | None:
    # A prompt may be empty; what is to be learnt may not.
    if row.get("prompt", "") in (None, []):
        return "blank"
    learnt = row["completion"] if "completion" in row else next(iter(row.values()))
    if not isinstance(learnt, list):
        return None if learnt and learnt.strip() else "blank"
    if not learnt:
        return "blank"
    said = [turn for turn in learnt if turn["role"] == "assistant"]
    if not said:
        return "unanswered"
    is_said = any(turn.get("tool_calls") or turn["content"].strip() for turn in said)
    return None if is_said else "blank"


def _used(counts: Counts, rows: Sequence[Row], drawn: Sequence[Row]) -> Counts:
    distinct = len({content(row) for row in drawn})
    return replace(
        counts,
        undrawn=len(rows) - len(drawn),
        used=len(drawn),
        duplicated=len(drawn) - distinct,
    )


def _left_out(counts: Counts) -> str:
    reasons = {
        "blank": counts.blank,
        "without an assistant's turn": counts.unanswered,
    }
    said = [f"{number} {reason}" for reason, number in reasons.items() if number]
    return f" ({counts.read} read, {', '.join(said)})" if said else ""
