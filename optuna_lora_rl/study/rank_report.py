"""What became of a trial's layers: their ranks, how they changed, and what the monitor read."""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from optuna_lora_rl.study import charts
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.console import Console

    from optuna_lora_rl.study.layers import Layers
    from optuna_lora_rl.study.spec import StudySpec

_PANEL = (400, 230)
_HEADS = ("layer", "rank", "parameters", "update", "trend", "gradient", "trend")
# More of them are folded away in the HTML report.
_FEW_CHANGES = 12
_LEGEND = (
    "Update: Frobenius norm of the layer's dW. Gradient: norm of its factors' gradients, after "
    "clipping. Trends: mean change from one reading to the next, over the last five."
)


def show(console: Console, trial: FrozenTrial, spec: StudySpec) -> None:
    """Prints a trial's ranks and their changes, the course of its layers, and suggestions."""
    score = wording.score(outcome.final_score(trial))
    title = f"Trial {trial.number} ({trial.state.name.lower()}, score {score})"
    _say(console, Text(title, style="bold"))
    _say(console, Text(outcome.configuration(trial), style="dim"))
    known = layers.read(trial, spec.folder)
    read = known.monitor
    if read:
        console.print(_course(read["course"]))
        console.print(_layers(read["layers"]))
        _say(console, Text(_LEGEND, style="dim"))
    else:
        _say(console, Text(_why_nothing(trial, spec, known), style="yellow"))
        console.print(_ranks(known.ranks))
    if known.rank_changes:
        console.print(_changes(known.rank_changes))
    cut = trial.user_attrs.get("truncation")
    if cut:
        _say(console, _cut(cut))
    said = suggestions(trial, spec, known)
    if read and not said:
        _say(console, Text("Nothing to suggest: no layer stands out.", style="green"))
    for sentence in said:
        _say(console, f"- {sentence}")


def suggestions(trial: FrozenTrial, spec: StudySpec, known: Layers) -> list[str]:
    """What the run's losses and the layers' readings suggest, a sentence each."""
    from optuna_lora_rl.rank import advisor

    found = []
    curve = [row for row in trial.user_attrs.get("curve", []) if "train_loss" in row]
    # Losses on growing parts of the validation set do not compare.
    if curve and spec.training.first_evaluation == 1:
        train, evaluated = ([row[key] for row in curve] for key in ("train_loss", "loss"))
        about = advisor.review(train, evaluated)
        found += [] if about is None else [about]
    by_text: dict[tuple[str, str], list[str]] = {}
    for one in known.monitor.get("suggestions", []):
        by_text.setdefault((one["concern"], one["text"]), []).append(one["layer"])
    for (concern, text), named in by_text.items():
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        found.append(f"{concern}, {named[0]}{more}: {text}")
    return found


def section(trial: FrozenTrial, spec: StudySpec) -> str:
    """The same as sections of the report."""
    known = layers.read(trial, spec.folder)
    parts = [_ranks_section(known.ranks), _changes_section(known.rank_changes)]
    if known.missing:
        parts.append(f"<p><b>Note:</b> {html.escape(known.missing)}.</p>")
    if known.monitor:
        parts.append(_monitor_section(known.monitor, suggestions(trial, spec, known)))
    return "\n".join(filter(None, parts))


def truncations(trials: Iterable[FrozenTrial]) -> str:
    """A section of the report: what cutting adapters after training did, a row a trial."""
    rows = []
    for trial in trials:
        cut = trial.user_attrs.get("truncation")
        if cut is None:
            continue
        rows.append(
            (
                str(trial.number),
                f"{cut['quality_before']:.4f}",
                f"{cut['quality_after']:.4f}",
                wording.count(cut["parameters_before"]),
                wording.count(cut["parameters_after"]),
                str(cut["largest_rank"]),
                outcome.configuration(trial),
            )
        )
    if not rows:
        return ""
    heads = ("trial", "quality before", "after", "parameters before", "after", "largest rank", "")
    return (
        "<h2>Cut after training</h2><p class=quiet>Scores are those of the adapters as they were "
        f"cut.</p>{_html(heads, rows)}"
    )


def _why_nothing(trial: FrozenTrial, spec: StudySpec, known: Layers) -> str:
    if known.missing:
        return f"{known.missing[0].upper()}{known.missing[1:]}."
    if spec.training.monitor == 0:
        return "Nothing was read of its layers: training.monitor is 0."
    if "quality" not in trial.user_attrs or trial.state.name != "COMPLETE":
        return "Nothing was kept of its layers: only completed trials keep their readings."
    return "Nothing was read of its layers: it is of an older version, or the model was sharded."


def _course(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("step", "update", "gradient", "parameters")
    table.title = "Medians over the layers"
    table.title_justify = "left"
    for row in rows:
        table.add_row(
            str(row["step"]),
            f"{row['weight_norm']:.3g}",
            f"{row['gradient_norm']:.3g}",
            f"{row['parameters']:,}",
        )
    return table


def _layers(rows: Sequence[dict[str, Any]]) -> Table:
    from optuna_lora_rl.rank.tables import shared_start

    start = shared_start(row["layer"] for row in rows)
    table = _table(f"layer\n{start}…" if start else "layer", *_HEADS[1:])
    for row in rows:
        table.add_row(*_cells({**row, "layer": row["layer"].removeprefix(start)}))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["layer"],
        str(row["rank"]),
        f"{row['parameters']:,}",
        f"{row['weight_norm']:.3g}",
        f"{row['weight_trend']:+.0%}",
        f"{row['gradient_norm']:.3g}",
        f"{row['gradient_trend']:+.0%}",
    )


def _ranks(ranks: dict[str, int]) -> Table:
    table = _table("layer", "rank")
    for name, rank in ranks.items():
        table.add_row(name, str(rank))
    return table


def _changes(changes: Sequence[dict[str, Any]]) -> Table:
    table = _table("after step", "layer", "rank", "because")
    for change in changes:
        table.add_row(*_change(change))
    return table


def _change(change: dict[str, Any]) -> tuple[str, ...]:
    ranks = f"{change['before']} → {change['after']}"
    return str(change["step"]), change["layer"], ranks, change["reason"]


def _cut(cut: dict[str, float]) -> str:
    return (
        f"Cut after training to rank {cut['largest_rank']} at most: "
        f"{wording.count(cut['parameters_before'])} parameters became "
        f"{wording.count(cut['parameters_after'])}, quality {cut['quality_before']:.4f} became "
        f"{cut['quality_after']:.4f}."
    )


def _ranks_section(ranks: dict[str, int]) -> str:
    if not ranks:
        return ""
    most = max(ranks.values())
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='width:50%'>"
        f"<div class=bar style='width:{100 * r / most:.0f}%'></div></td><td>{r}</td></tr>"
        for name, r in ranks.items()
    )
    return f"<h2>Its ranks, layer by layer</h2><table class=wide>{rows}</table>"


def _changes_section(changes: Sequence[dict[str, Any]]) -> str:
    rows = [_change(change) for change in changes]
    if not rows:
        return ""
    heads = ("after step", "layer", "rank", "because")
    shown = "open" if len(rows) <= _FEW_CHANGES else ""
    return (
        f"<h2>How they changed in training</h2><details {shown}><summary>Changes: {len(rows)}"
        f"</summary>{_html(heads, rows)}</details>"
    )


def _monitor_section(read: dict[str, Any], said: Sequence[str]) -> str:
    panels = "".join(
        f"<div><b>{title}</b>{_picture(read['course'], key, title)}</div>"
        for key, title in (("weight_norm", "norm of the update"), ("gradient_norm", "gradient"))
    )
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    found = f"<ul>{listed}</ul>" if listed else "<p>No layer stands out.</p>"
    rows = [_cells(row) for row in read["layers"]]
    return (
        "<h2>Its layers in training</h2><p class=quiet>Medians over the layers.</p>"
        f"<div class=panels>{panels}</div>{found}<details><summary>Layer by layer</summary>"
        f"<p class=quiet>{_LEGEND}</p>{_html(_HEADS, rows)}</details>"
    )


def _picture(course: Sequence[dict[str, Any]], key: str, title: str) -> str:
    points = [(float(row["step"]), float(row[key])) for row in course]
    return charts.chart(
        [charts.Series(points, dots=True)], x="optimizer step", y=title, size=_PANEL
    )


def _html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table class=wide><tr>{titles}</tr>{body}</table>"


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    for head in heads:
        words = head.startswith(("layer", "because"))
        table.add_column(head, justify="left" if words else "right", overflow="fold")
    return table


def _say(console: Console, text: Text | str) -> None:
    console.print(text, highlight=False, markup=False)
