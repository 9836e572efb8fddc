"""What became of a trial's layers: their ranks, how they changed, and what the monitor read."""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layer_names
from optuna_lora_rl.rank import tables
from optuna_lora_rl.study import charts
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.trial import FrozenTrial
    from rich.console import Console

    from optuna_lora_rl.study.layers import Layers
    from optuna_lora_rl.study.spec import StudySpec

_PANEL = (400, 230)
_HEADS = ("layer", "rank", "parameters", "update", "trend", "gradient", "trend")
_GROUP_HEADS = ("layers", "blocks", "rank", "params", *_HEADS[3:])
_MEDIANS = ("weight_norm", "weight_trend", "gradient_norm", "gradient_trend")
# More of them are folded away in the HTML report.
_FEW_CHANGES = 12
_LEGEND = (
    "Update: Frobenius norm of the layer's dW. Gradient: norm of its factors' gradients, after "
    "clipping. Trends: mean change from one reading to the next, over the last five."
)


_IN_GROUPS = (
    " Each is the median over the layers of a row, in brackets the lowest and the highest, and "
    "params all they train; the command report --all shows every layer, --csv FILE writes them."
)


def show(console: Console, trial: FrozenTrial, spec: StudySpec, *, whole: bool = False) -> None:
    """Prints a trial's ranks and their changes, the course of its layers, and suggestions.

    Args:
        console: Where to.
        trial: The trial.
        spec: Its study's file.
        whole: Whether every layer has its row, however many there are.
    """
    score = wording.score(outcome.final_score(trial))
    title = f"Trial {trial.number} ({trial.state.name.lower()}, score {score})"
    _say(console, Text(title, style="bold"))
    _say(console, Text(outcome.configuration(trial), style="dim"))
    known = layers.read(trial, spec.folder)
    read, many = known.monitor, not whole and _are_many(known)
    if read:
        console.print(_course(read["course"]))
        table = _table(*_GROUP_HEADS) if many else _layers(read["layers"])
        for row in _grouped(read["layers"]) if many else ():
            table.add_row(*row)
        console.print(table)
        _say(console, Text(_LEGEND + (_IN_GROUPS if many else ""), style="dim"))
    else:
        _say(console, Text(_why_nothing(trial, spec, known), style="yellow"))
        if known.ranks:
            console.print(_ranks_in_groups(known.ranks) if many else _ranks(known.ranks))
    if known.rank_changes:
        rows = _changes_in_groups(known.rank_changes) if many else known.rank_changes
        console.print(_changes(rows))
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
    from optuna_lora_rl.finetuning import advisor

    found = []
    curve = [row for row in trial.user_attrs.get("curve", []) if "train_loss" in row]
    if curve and (spec.training.first_evaluation == 1 or "untuned_loss" in curve[-1]):
        train = [row["train_loss"] for row in curve]
        # Evaluations may read different parts of the validation set: what is left of the untuned
        # model's loss compares.
        whole = curve[-1].get("untuned_loss")
        evaluated = [
            row["loss"] if whole is None else row["loss"] / row["untuned_loss"] * whole
            for row in curve
        ]
        about = advisor.review(train, evaluated)
        found += [] if about is None else [about]
    told = known.monitor.get("suggestions", [])
    if _are_many(known):
        sentences = wording.joined(f"{one['concern']}, {{}}: {one['text']}" for one in told)
        for sentence, numbers in sentences.items():
            named = layer_names.in_words(told[number]["layer"] for number in numbers)
            found.append(sentence.replace("{}", named, 1))
        return found
    by_text: dict[tuple[str, str], list[str]] = {}
    for one in told:
        by_text.setdefault((one["concern"], one["text"]), []).append(one["layer"])
    for (concern, text), names in by_text.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"{concern}, {names[0]}{more}: {text}")
    return found


def write_csv(file: Path, trial: FrozenTrial, spec: StudySpec) -> None:
    """Writes what a trial recorded of its layers, a row a layer, with all digits.

    Raises:
        UserError: When it recorded nothing, it is not here, or the file cannot be written.
    """
    known = layers.read(trial, spec.folder)
    rows: dict[str, dict[str, Any]] = {
        row["layer"]: {name: value for name, value in row.items() if name != "layer"}
        for row in known.monitor.get("layers", [])
    } or {name: {"rank": rank} for name, rank in known.ranks.items()}
    if not rows:
        raise UserError(f"--csv: {_why_nothing(trial, spec, known)}")
    tables.write_rows(file, rows)


def section(trial: FrozenTrial, spec: StudySpec) -> str:
    """The same as sections of the report."""
    known = layers.read(trial, spec.folder)
    parts = [
        _ranks_section(known.ranks),
        _changes_section(
            _changes_in_groups(known.rank_changes) if _are_many(known) else known.rank_changes,
            len(known.rank_changes),
        ),
    ]
    if known.missing:
        parts.append(f"<p><b>Note:</b> {html.escape(known.missing)}.</p>")
    if known.monitor:
        said = suggestions(trial, spec, known)
        parts.append(_monitor_section(known.monitor, said, many=_are_many(known)))
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
    start = tables.shared_start(row["layer"] for row in rows)
    table = _table(f"layer\n{start}…" if start else "layer", *_HEADS[1:])
    for row in rows:
        table.add_row(*_cells({**row, "layer": row["layer"].removeprefix(start)}))
    return table


def _are_many(known: Layers) -> bool:
    return max(len(known.ranks), len(known.monitor.get("layers", []))) > layer_names.FEW


def _grouped(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a row for each group of layers."""
    known = {row["layer"]: row for row in rows}
    found: list[tuple[str, ...]] = []
    for group in layer_names.groups(known):
        columns = {key: [known[name][key] for name in group.names] for key in rows[0]}
        median = {key: np.median(columns[key]) for key in _MEDIANS}
        found.append(
            (
                group.module,
                group.blocks,
                tables.spread(columns["rank"]),
                wording.count(sum(columns["parameters"])),
                f"{median['weight_norm']:.3g}",
                _trend(median["weight_trend"]),
                f"{median['gradient_norm']:.3g}",
                _trend(median["gradient_trend"]),
            )
        )
    return found


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["layer"],
        str(row["rank"]),
        f"{row['parameters']:,}",
        f"{row['weight_norm']:.3g}",
        _trend(row["weight_trend"]),
        f"{row['gradient_norm']:.3g}",
        _trend(row["gradient_trend"]),
    )


def _trend(share: float) -> str:
    said = f"{share:+.0%}"
    return "0%" if said in ("+0%", "-0%") else said


def _ranks(ranks: dict[str, int]) -> Table:
    table = _table("layer", "rank")
    for name, rank in ranks.items():
        table.add_row(name, str(rank))
    return table


def _ranks_in_groups(ranks: dict[str, int]) -> Table:
    table = _table("layers", "blocks", "rank")
    for group in layer_names.groups(ranks):
        spread = tables.spread(ranks[name] for name in group.names)
        table.add_row(group.module, group.blocks, spread)
    return table


def _changes_in_groups(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Changes of one kind of layer after one step, for reasons that differ in numbers alone."""
    where = layer_names.of_names(change["layer"] for change in changes)
    together: dict[tuple[int, str, bool], list[dict[str, Any]]] = {}
    for change in changes:
        grows = change["after"] > change["before"]
        key = (change["step"], where[change["layer"]].module, grows)
        together.setdefault(key, []).append(change)
    found = []
    for (step, _, _), alike in together.items():
        for reason, numbers in wording.joined(change["reason"] for change in alike).items():
            chosen = [alike[number] for number in numbers]
            found.append(
                {
                    "step": step,
                    "layer": layer_names.in_words(change["layer"] for change in chosen),
                    "before": tables.spread(change["before"] for change in chosen),
                    "after": tables.spread(change["after"] for change in chosen),
                    "reason": reason,
                }
            )
    return found


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
    title, shown = "layer by layer", [(name, [rank]) for name, rank in ranks.items()]
    if len(ranks) > layer_names.FEW:
        title = "by kind of layer and range of blocks"
        shown = [
            (f"{group.module}, blocks {group.blocks}", [ranks[name] for name in group.names])
            for group in layer_names.groups(ranks)
        ]
    most = max(float(np.mean(found)) for _, found in shown)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='width:50%'>"
        f"<div class=bar style='width:{100 * np.mean(found) / most:.0f}%'></div></td>"
        f"<td>{tables.spread(found)}</td></tr>"
        for name, found in shown
    )
    return f"<h2>Its ranks, {title}</h2><table class=wide>{rows}</table>"


def _changes_section(changes: Sequence[dict[str, Any]], number: int) -> str:
    rows = [_change(change) for change in changes]
    if not rows:
        return ""
    heads = ("after step", "layer", "rank", "because")
    shown = "open" if len(rows) <= _FEW_CHANGES else ""
    return (
        f"<h2>How they changed in training</h2><details {shown}><summary>Changes: {number}"
        f"</summary>{_html(heads, rows)}</details>"
    )


def _monitor_section(read: dict[str, Any], said: Sequence[str], *, many: bool) -> str:
    panels = "".join(
        f"<div><b>{title}</b>{_picture(read['course'], key, title)}</div>"
        for key, title in (("weight_norm", "norm of the update"), ("gradient_norm", "gradient"))
    )
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    found = f"<ul>{listed}</ul>" if listed else "<p>No layer stands out.</p>"
    folded, legend = "Layer by layer", _LEGEND
    table = _html(_HEADS, map(_cells, read["layers"]))
    if many:
        folded, legend = "By kind of layer and range of blocks", _LEGEND + _IN_GROUPS
        table = _html(_GROUP_HEADS, _grouped(read["layers"]))
    return (
        "<h2>Its layers in training</h2><p class=quiet>Medians over the layers.</p>"
        f"<div class=panels>{panels}</div>{found}<details><summary>{folded}</summary>"
        f"<p class=quiet>{legend}</p>{table}</details>"
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
