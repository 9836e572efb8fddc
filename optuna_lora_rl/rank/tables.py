"""Spectra and ranks as a person reads them: tables, CSV, a heat map."""

from __future__ import annotations

import csv
import html
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layer_names

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

    from optuna_lora_rl.rank.capacity import Capacity
    from optuna_lora_rl.rank.capacity import Memory
    from optuna_lora_rl.rank.spectrum import Spectrum
    from optuna_lora_rl.rank.truncation import Size
    from optuna_lora_rl.rank.truncation import Truncation

# The measures of a spectrum: its attribute, the title in a figure, the heading of a column.
_MEASURES = (
    ("effective_rank", "Effective rank (values over 1% of the largest)", "over\n1%"),
    ("entropy_rank", "Entropy rank", "entropy"),
    ("stable_rank", "Stable rank", "stable"),
    ("rank_90", "Rank that holds 90% of the energy", "90%"),
    ("rank_95", "Rank that holds 95% of the energy", "95%"),
    ("spectral_norm", "Spectral norm", "2-norm"),
    ("frobenius_norm", "Frobenius norm", "F-norm"),
)
# Headings of those that are left out first where a terminal is narrow.
_LESS_TELLING = ("stable", "entropy", "F-norm", "90%")
# Cells of a heat map that still have room for their number.
_WRITTEN_CELLS = 12 * 24


def spectra(
    found: Mapping[str, Spectrum], more: Mapping[str, Mapping[str, float]], width: int
) -> Table:
    """One row a layer.

    Args:
        found: The spectra.
        more: Further columns: their headings, and the number of each layer.
        width: Of the terminal; where it is narrow some of the measures are left out.
    """
    start = shared_start(found)
    columns = {
        "layer" + (f"\n{start}…" if start else ""): [name.removeprefix(start) for name in found],
        "shape": ["{}x{}".format(*one.shape) for one in found.values()],
        **{heading: [_number(values[n]) for n in found] for heading, values in more.items()},
        **{
            heading: [_number(getattr(one, measure)) for one in found.values()]
            for measure, _, heading in _MEASURES
        },
    }
    for heading in _LESS_TELLING:
        if _width(columns) > width:
            del columns[heading]
    return _of_columns(columns)


def spectra_in_groups(
    found: Mapping[str, Spectrum], more: Mapping[str, Mapping[str, float]], width: int
) -> Table:
    """One row for the layers of one kind in a range of blocks: medians, lowest and highest.

    Args:
        found: As for :func:`spectra`.
        more: The same.
        width: The same.
    """
    groups = layer_names.groups(found)
    shapes = [{"{}x{}".format(*found[name].shape) for name in group.names} for group in groups]
    columns = {
        "layers": [group.module for group in groups],
        "blocks": [group.blocks for group in groups],
        "number": [str(len(group.names)) for group in groups],
        "shape": ["\n".join(sorted(alike)) for alike in shapes],
        **{
            heading: [spread(values[name] for name in group.names) for group in groups]
            for heading, values in more.items()
        },
        **{
            heading: [
                spread(getattr(found[name], measure) for name in group.names) for group in groups
            ]
            for measure, _, heading in _MEASURES
        },
    }
    for heading in (*_LESS_TELLING, "2-norm"):
        if _width(columns) > width:
            del columns[heading]
    return _of_columns(columns)


def spread(values: Iterable[float]) -> str:
    """The median of values, and the lowest and the highest where they differ: ``8 (4…16)``."""
    known = sorted(values)
    low, median, high = map(_number, (known[0], known[len(known) // 2], known[-1]))
    return median if low == high else f"{median} ({low}…{high})"


def _of_columns(columns: Mapping[str, Sequence[str]]) -> Table:
    table = _table(*columns)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Columns of a terminal that a table takes, with a space on either side of each cell."""
    widest = (
        max(len(line) for cell in (heading, *cells) for line in cell.split("\n"))
        for heading, cells in columns.items()
    )
    return 1 + sum(cells + 2 for cells in widest)


def write_csv(
    file: Path, found: Mapping[str, Spectrum], more: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes one row a layer, with all digits.

    Raises:
        UserError: When the file cannot be written.
    """
    columns = {
        name: {**{heading: column[name] for heading, column in more.items()}, **one.row()}
        for name, one in found.items()
    }
    write_rows(file, columns)


def write_rows(file: Path, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes one row a layer: where it stands, and its columns by name.

    Raises:
        UserError: When the file cannot be written.
    """
    where = layer_names.of_names(columns)
    rows = [
        {"layer": name, "block": where[name].block, "module": where[name].module, **cells}
        for name, cells in columns.items()
    ]
    try:
        with _made(file).open("w", encoding="utf-8", newline="") as content:
            writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"the table cannot be written to {str(file)!r}: {error}") from None


def heat_map(found: Mapping[str, Spectrum], title: str) -> Figure:
    """Draws each measure over blocks and modules, one at a time, with a menu to choose."""
    import plotly.graph_objects as go

    where = layer_names.of_names(found)
    modules = list(dict.fromkeys(place.module for place in where.values()))
    known = {place.block for place in where.values()}
    blocks = sorted(known, key=lambda block: -1 if block is None else block)
    at = {place: name for name, place in where.items()}
    cells = [[at.get(layer_names.Place(block, module)) for module in modules] for block in blocks]
    rows = ["none" if block is None else str(block) for block in blocks]
    written = len(modules) * len(blocks) <= _WRITTEN_CELLS
    figure = go.Figure()
    shown = _telling(found)
    for number, (measure, _, _) in enumerate(_MEASURES):
        values = [
            [None if c is None else getattr(found[c], measure) for c in row] for row in cells
        ]
        figure.add_heatmap(
            x=[_plain(module) for module in modules],
            y=rows,
            z=values,
            text=[["" if v is None else _number(v) for v in row] for row in values],
            customdata=[[_described(found, c) for c in row] for row in cells],
            texttemplate="%{text}" if written else None,
            hovertemplate="%{customdata}: %{text}<extra></extra>",
            colorscale="Viridis",
            hoverongaps=False,
            xgap=1,
            ygap=1,
            visible=number == shown,
        )
    _lay_out(figure, title, (len(modules), len(blocks)), shown)
    return figure


def write_figure(file: Path, figure: Figure) -> None:
    """Writes a page that needs no network.

    Raises:
        UserError: When the name does not end in .html, or the file cannot be written.
    """
    check_page(file)
    try:
        figure.write_html(_made(file), include_plotlyjs=True)
    except OSError as error:
        raise UserError(f"the figure cannot be written to {str(file)!r}: {error}") from None


def check_page(file: Path | None) -> None:
    """Checks, before the work, that a figure's name is that of a page."""
    if file is not None and file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"figures are written as HTML, so {str(file)!r} has to end in .html")


def capacities(found: Iterable[Capacity]) -> Table:
    """One row a rank: what an adapter on all layers holds and takes."""
    table = _table("rank")
    for heading in ("parameters", "of the\nweights", "times\nfewer", "expressible\nrank"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(
            str(one.rank),
            f"{one.parameters:,}",
            f"{one.parameters / one.dense:.2%}",
            f"{one.compression:.3g}",
            f"{one.coverage:.1%}",
        )
    return table


def ranks(found: Mapping[str, int]) -> Table:
    """Ranks over blocks and modules: one row for each run of blocks that agree."""
    where = layer_names.of_names(found)
    modules = list(dict.fromkeys(place.module for place in where.values()))
    rows: dict[int | None, dict[str, int]] = {}
    for name, place in where.items():
        rows.setdefault(place.block, {})[place.module] = found[name]
    table = _table("blocks")
    for module in modules:
        table.add_column(module, justify="right")
    blocks = list(rows)
    first = 0
    for i, block in enumerate(blocks):
        if i + 1 < len(blocks) and rows[blocks[i + 1]] == rows[block]:
            continue
        span = layer_names.span(blocks[first], block)
        table.add_row(span, *(str(rows[block].get(module, "")) for module in modules))
        first = i + 1
    return table


def memory(found: Memory) -> Table:
    """What training holds."""
    table = _table("memory in training")
    table.add_column("", justify="right")
    for words, count in (
        ("base weights", found.base),
        ("adapter", found.factors),
        ("gradients", found.gradients),
        ("Adam's moments", found.moments),
        ("activations and logits", found.activations),
    ):
        table.add_row(words, size(count))
    table.add_row("together", size(found.total), style="bold")
    return table


def sizes(found: Iterable[Size], qualities: Iterable[float] | None = None) -> Table:
    """What keeping each share of an adapter's energy takes, and leaves of its quality if known."""
    table = _table("energy kept")
    for heading in ("parameters", "largest rank", "largest error of a layer"):
        table.add_column(heading, justify="right")
    if qualities is not None:
        table.add_column("quality", justify="right")
    left = None if qualities is None else [[f"{quality:.4f}"] for quality in qualities]
    for number, one in enumerate(found):
        table.add_row(
            f"{one.energy:.4g}",
            f"{one.parameters:,}",
            str(one.largest_rank),
            f"{one.error:.1%}",
            *([] if left is None else left[number]),
        )
    return table


def truncation(found: Truncation) -> Table:
    """Ranks before and after, and what each layer lost."""
    start = shared_start(found.before)
    table = _table("layer" + (f"\n{start}…" if start else ""))
    for heading in ("rank\nbefore", "rank\nnow", "lost of\nthe update"):
        table.add_column(heading, justify="right")
    for name, before in found.before.items():
        lost = f"{found.errors[name]:.1%}"
        table.add_row(name.removeprefix(start), str(before), str(found.after[name]), lost)
    return table


def truncation_in_groups(found: Truncation) -> Table:
    """The same, one row for the layers of one kind in a range of blocks."""
    table = _table("layers")
    for heading in ("blocks", "rank\nbefore", "rank\nnow", "lost of\nthe update, %"):
        table.add_column(heading, justify="right")
    for group in layer_names.groups(found.before):
        columns = (found.before, found.after, {n: 100 * e for n, e in found.errors.items()})
        spreads = (spread(column[name] for name in group.names) for column in columns)
        table.add_row(group.module, group.blocks, *spreads)
    return table


def size(count: float) -> str:
    """Bytes in words, such as ``1.26 GB``."""
    return in_units(count, ("GB", "MB", "kB")) if count >= 1000 else f"{count:.0f} bytes"


def in_units(count: float, units: tuple[str, str, str]) -> str:
    """A count in words of three digits or one decimal, such as ``4.88 M`` and ``134.5 M``.

    Args:
        count: The count.
        units: The words for 10^9, 10^6 and 10^3.
    """
    for limit, unit in zip((1e9, 1e6, 1e3), units, strict=True):
        # What three digits would round up to a thousand has the next unit.
        if count >= 0.99995 * limit:
            scaled = count / limit
            return f"{scaled:.3g} {unit}" if scaled < 100 else f"{scaled:.4g} {unit}"
    return f"{count:.0f}"


def shared_start(names: Iterable[str]) -> str:
    """Returns the modules in which all layers lie, with a dot at the end."""
    parts = [name.split(".") for name in names]
    start = ""
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            return start
        start += f"{words[0]}."
    return ""


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        # The first column gives way where the terminal is narrow.
        table.add_column(
            heading,
            justify="right" if number > 0 else "left",
            no_wrap=number > 0,
            overflow="fold",
        )
    return table


def _telling(found: Mapping[str, Spectrum]) -> int:
    """The first measure in which layers differ; adapters often use all of their rank."""
    for number, (measure, _, _) in enumerate(_MEASURES):
        if len({getattr(one, measure) for one in found.values()}) > 1:
            return number
    return 0


def _lay_out(figure: Figure, title: str, cells: tuple[int, int], shown: int) -> None:
    modules, blocks = cells
    buttons: list[dict[str, Any]] = [
        {
            "label": words,
            "method": "update",
            "args": [{"visible": [number == i for i in range(len(_MEASURES))]}],
        }
        for number, (_, words, _) in enumerate(_MEASURES)
    ]
    menu = {
        "buttons": buttons,
        "active": shown,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 8},
    }
    figure.update_layout(
        title=_plain(title),
        template="plotly_white",
        width=max(640, 200 + 90 * modules),
        height=max(420, 240 + 26 * blocks),
        margin={"t": 140},
        updatemenus=[menu],
    )
    figure.update_xaxes(title="module", type="category", showgrid=False)
    figure.update_yaxes(title="block", type="category", autorange="reversed", showgrid=False)
    figure.update_yaxes(ticklabelstandoff=6)


def _described(found: Mapping[str, Spectrum], name: str | None) -> str:
    return "" if name is None else "{} ({}x{})".format(_plain(name), *found[name].shape)


def _plain(name: str) -> str:
    # A name as text: plotly reads tags in it.
    return html.escape(name, quote=False)


def _number(value: float) -> str:
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".")


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
