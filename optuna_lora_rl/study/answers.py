"""Answers before and after: the untuned model, the guides' configuration and the best adapter.

They are shown in the terminal, in the report and in the adapter's card.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from rich.table import Table
from rich.text import Text

from optuna_lora_rl.errors import shortened
from optuna_lora_rl.finetuning.questions import is_exact

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


ANSWERS = "answers"
UNTUNED, GUIDES, BEST = "untuned", "guides", "best"
WORDS = {UNTUNED: "untuned", GUIDES: "guides", BEST: "best adapter"}
# Characters of a question and of an answer that a terminal shows.
_MOST_SHOWN = 160


def of(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """What was answered, where the adapter of this trial answered as the best; else empty.

    It holds ``asked`` (how many questions), ``split``, ``questions``, ``expected``, and ``of``: by
    ``untuned``, ``guides`` and ``best`` the ``trial``, how many answers were ``right`` and those
    ``given`` to the questions that are shown.
    """
    known: dict[str, Any] = study.user_attrs.get(ANSWERS, {})
    asked, best = known.get("asked"), known.get("of", {}).get(BEST, {})
    return known if asked and best.get("trial") == trial.number else {}


def counted(known: Mapping[str, Any]) -> str:
    """How many answers are right, in a sentence."""
    counts = ", ".join(f"{WORDS[name]} {one['right']}" for name, one in known["of"].items())
    asked = "1 question" if known["asked"] == 1 else f"{known['asked']} questions"
    return f"Exact match on {asked} of the {known['split']} split: {counts}."


def table(known: Mapping[str, Any]) -> Table:
    """The answers that are shown, for a terminal."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for number, question in enumerate(known["questions"]):
        expected = known["expected"][number]
        rows.add_row("", "")
        rows.add_row("question", _line(question))
        rows.add_row("expected", _line(expected))
        for name, one in known["of"].items():
            given = one["given"][number]
            right = is_exact(given, expected)
            rows.add_row(WORDS[name], _line(given, "green" if right else ""))
    return rows


def section(study: optuna.Study, trial: FrozenTrial) -> str:
    """The report's section: how many answers are right, and some to read; may be empty."""
    known = of(study, trial)
    if not known:
        return ""
    heads = ("question", "expected", *(WORDS[name] for name in known["of"]))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = ""
    for number, question in enumerate(known["questions"]):
        expected = known["expected"][number]
        body += f"<tr><td>{_cell(question)}</td><td>{_cell(expected)}</td>"
        for one in known["of"].values():
            given = one["given"][number]
            kind = " class=right" if is_exact(given, expected) else ""
            body += f"<td{kind}>{_cell(given)}</td>"
        body += "</tr>"
    return (
        f"<h2>Answers before and after</h2><p class=quiet>{counted(known)}</p>"
        f'<table class="wide answers"><tr>{head}</tr>{body}</table>'
    )


def _cell(text: str) -> str:
    # Lines are kept by the page's style.
    return html.escape(printable(text).strip())


def _line(text: str, style: str = "") -> Text:
    return Text(shortened(" ".join(printable(text).split()), _MOST_SHOWN) or "(nothing)", style)


def printable(text: str) -> str:
    """A model may say anything, sequences that steer a terminal among it."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
