"""What was made of a study's data, in words: a line, warnings, and a table for the report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

# User attribute of a study: ``FineTuner.data_facts()``.
DATA = "data"
# Below it the mean over a validation set says little.
_FEW = 30
# Names of columns that the line has room for.
_MOST = 6
_LEFT_OUT = {
    "blank": "blank",
    "unanswered": "without an assistant's turn",
    "overlapping": "in another split",
    "set_aside": "set aside for validation",
    "repeated": "repeated in what was set aside",
    "undrawn": "not drawn",
    "emptied": "without anything left to learn",
}
_ABOUT = {
    "cut": "cut",
    "duplicated": "repeat another",
    "special": "with a special token's text",
}
_FORMS = {"text": "texts", "prompt-completion": "prompts and completions", "messages": "chats"}


def line(facts: Mapping[str, Any]) -> str:
    """What was read, what is learnt of it and what was left out, by split."""
    splits: Mapping[str, Mapping[str, int]] = facts["splits"]
    parts = [f"{name} {_split(counts)}" for name, counts in splits.items()]
    said = [f"{', '.join(parts)}", f"{_FORMS[facts['kind']]}, learnt in {facts['learns']}"]
    cut = sum(counts["cut"] for counts in splits.values())
    repeating = sum(counts["duplicated"] for counts in splits.values())
    special = sum(counts["special"] for counts in splits.values())
    if cut:
        said.append(f"{cut} cut at {facts['max_length']} tokens")
    if repeating:
        said.append(f"{repeating} repeat another")
    if special:
        said.append(f"{special} hold the text of a special token, which becomes that token")
    unread = facts["unread"]
    if unread:
        more = f" and {len(unread) - _MOST} more" if len(unread) > _MOST else ""
        said.append(f"not read: {', '.join(map(repr, unread[:_MOST]))}{more}")
    return f"data: {'; '.join(said)}"


def evaluations(facts: Mapping[str, Any]) -> str:
    """How many rows evaluations read; empty where it was not recorded."""
    rows = facts.get("evaluations")
    if not rows:
        return ""
    *early, last = map(str, rows)
    counts = f"{', '.join(early)} and then {last}" if early else last
    if len(set(rows)) == 1:
        counts = f"{last} each time" if early else last
    used = facts["splits"]["validation"]["used"]
    return f"evaluations read {counts} of {used} validation rows"


def _cost(facts: Mapping[str, Any]) -> str:
    read = evaluations(facts)
    return f"{read}, {facts['evaluated']:.0%} of a trial's work as tokens count it" if read else ""


def warnings(facts: Mapping[str, Any]) -> list[str]:
    """What makes the study's results less worth than they look."""
    said = []
    used: int = facts["splits"]["validation"]["used"]
    used = facts.get("evaluations", [used])[-1]
    count: int = used if facts["answered"] is None else facts["answered"]
    if count == 1:
        said.append(
            "validation reads one example: which configuration is best for it says nothing of "
            "others; give it more (data.validation, data.validation_fraction)"
        )
    elif count < _FEW:
        said.append(
            f"validation reads only {count} examples: their mean is uncertain by "
            f"{1 / math.sqrt(count):.0%} of what single examples differ by, so that near "
            "configurations cannot be told apart (data.validation, data.validation_fraction)"
        )
    return said


def section(facts: Mapping[str, Any]) -> str:
    """The report's section: a table by split, and what else there is to know."""
    splits: Mapping[str, Mapping[str, int]] = facts["splits"]
    rows = {"read": "rows read", **_LEFT_OUT, "used": "used", **_ABOUT}
    shown = {
        name: words
        for name, words in rows.items()
        if name in ("read", "used") or any(counts[name] for counts in splits.values())
    }
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in splits)
    body = ""
    for name, words in shown.items():
        label = f"left out: {words}" if name in _LEFT_OUT else words
        label = f"of them {words}" if name in _ABOUT else label
        cells = "".join(f"<td>{counts[name]:,}</td>" for counts in splits.values())
        body += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    notes = [
        f"{_FORMS[facts['kind']].capitalize()}, learnt in {facts['learns']}; at most "
        f"{facts['max_length']} tokens each.",
        *filter(None, [_sentence(_cost(facts))]),
        *map(_sentence, warnings(facts)),
    ]
    if facts["unread"]:
        notes.append(f"Columns that no example holds: {', '.join(map(repr, facts['unread']))}.")
    words = "".join(f"<p class=quiet>{html.escape(note)}</p>" for note in notes)
    return f"<h2>The data</h2><table><tr><th></th>{heads}</tr>{body}</table>{words}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _split(counts: Mapping[str, int]) -> str:
    if counts["used"] == counts["read"]:
        return f"{counts['used']} {'row' if counts['used'] == 1 else 'rows'}"
    left_out = [f"{counts[name]} {words}" for name, words in _LEFT_OUT.items() if counts[name]]
    return f"{counts['used']} of {counts['read']} rows ({', '.join(left_out)})"
