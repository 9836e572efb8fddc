"""A comparison's figures: one page of HTML that needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from optuna_lora_rl.learning import statistics

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from studies.comparison.summary import Curves

# Okabe and Ito's colours, which colour-blind people tell apart, then darker ones; the reference
# has its own.
_REFERENCE = "#0f766e"
_COLOURS = (
    "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#B8A800",
    "#7b3294", "#8c510a", "#3b4cc0", "#666666", "#c51b7d", "#1b7837", "#b2182b",
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot")
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1e293b"}
_GRID = "#e2e8f0"
_COLUMNS = 2


def page(
    title: str,
    found: Curves,
    sections: Mapping[str, Sequence[str]],
    reference: str,
    after: Sequence[int],
) -> str:
    """Regret and rank over trials, and wins and losses by problem."""
    styles = _styles(list(found.regret), reference)
    by_section = {name: found.of(rows) for name, rows in sections.items()}
    figures = [
        (
            "Regret over trials",
            "Mean over problems and seeds of the best configuration so far (0 the best known, 1 "
            f"the median); the band is the 95% interval of {reference}.",
            _regrets(by_section, reference, styles),
        ),
        (
            "Mean rank over trials",
            "1 is the best sampler of a study; equal regrets share a rank.",
            _ranks(dict(list(by_section.items())[:2]), reference, styles),
        ),
        (
            "Wins and losses by problem",
            f"Regret of the other sampler minus that of {reference}, mean over seeds: green where "
            f"{reference} is ahead, red where it is behind.",
            _wins(found, reference, after),
        ),
    ]
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for number, (head, note, figure) in enumerate(figures):
        plot = figure.to_html(
            full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False}
        )
        parts.append(f"<h2>{html.escape(head)}</h2><p>{html.escape(note)}</p>{plot}")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _styles(labels: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    others = [label for label in labels if label != reference]
    styles: dict[str, dict[str, Any]] = {
        label: {
            "color": _COLOURS[k % len(_COLOURS)],
            "dash": _DASHES[k // 4 % len(_DASHES)],
            "width": 1.6,
        }
        for k, label in enumerate(others)
    }
    return styles | {reference: {"color": _REFERENCE, "dash": "solid", "width": 3.5}}


def _grid_of(names: Sequence[str], found: Mapping[str, Curves]) -> go.Figure:
    from plotly.subplots import make_subplots

    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[
            f"{name} ({len(found[name].problems)} problem"
            f"{'s' if len(found[name].problems) > 1 else ''})"
            for name in names
        ],
        vertical_spacing=min(0.1, 90 / (330 * rows)),
        horizontal_spacing=0.08,
    )
    figure.update_layout(
        template="plotly_white",
        font=_FONT,
        # The legend has a line for each sampler.
        height=max(90 + 330 * rows, 120 + 32 * len(next(iter(found.values())).regret)),
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"itemsizing": "constant"},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    figure.update_xaxes(title_text="trial", row=rows)
    return figure


def _regrets(
    found: Mapping[str, Curves], reference: str, styles: Mapping[str, dict[str, Any]]
) -> go.Figure:

    figure = _grid_of(list(found), found)
    for k, (_, curves) in enumerate(found.items()):
        place = {"row": k // _COLUMNS + 1, "col": k % _COLUMNS + 1}
        trials = np.arange(1, curves.regret[reference].shape[2] + 1)
        low, high = np.quantile(
            statistics.resampled(curves.regret[reference], curves.clusters),
            [0.025, 0.975],
            axis=0,
        )
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=trials, y=_shown(high), **band, **place)
        figure.add_scatter(
            x=trials,
            y=_shown(low),
            fill="tonexty",
            fillcolor="rgba(15, 118, 110, 0.18)",
            **band,
            **place,
        )
        for label in _last(reference, curves.regret):
            figure.add_scatter(
                x=trials,
                y=_shown(curves.regret[label].mean((0, 1))),
                hovertemplate="%{y:.3f}",
                **_line(label, reference, styles, legend=k == 0),
                **place,
            )
    figure.update_yaxes(type="log", tickformat="~g", dtick="D2")
    figure.update_yaxes(title_text="regret", col=1)
    return figure


def _line(
    label: str, reference: str, styles: Mapping[str, dict[str, Any]], *, legend: bool
) -> dict[str, Any]:
    """How a sampler's line looks, the same in every panel, and whether the legend has it."""
    return {
        "name": label,
        "legendgroup": label,
        "legendrank": 1 if label == reference else 1000,
        "showlegend": legend,
        "mode": "lines",
        "line": styles[label],
    }


def _last(reference: str, labels: Iterable[str]) -> list[str]:
    """The labels, the reference last: it is drawn over the others."""
    return [*(label for label in labels if label != reference), reference]


def _shown(regret: np.ndarray) -> np.ndarray:
    """No less than a thousandth, on a logarithmic axis."""
    return np.maximum(regret, 1e-3)


def _ranks(
    found: Mapping[str, Curves], reference: str, styles: Mapping[str, dict[str, Any]]
) -> go.Figure:

    figure = _grid_of(list(found), found)
    for k, curves in enumerate(found.values()):
        ranks = statistics.ranks(curves.regret)
        for label in _last(reference, ranks):
            rank = ranks[label]
            figure.add_scatter(
                x=np.arange(1, rank.shape[2] + 1),
                y=rank.mean((0, 1)),
                hovertemplate="%{y:.1f}",
                **_line(label, reference, styles, legend=k == 0),
                row=k // _COLUMNS + 1,
                col=k % _COLUMNS + 1,
            )
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title_text="mean rank", col=1)
    return figure


def _wins(found: Curves, reference: str, after: Sequence[int]) -> go.Figure:
    import plotly.graph_objects as go

    others = [label for label in found.regret if label != reference]
    differences = {
        k: np.stack(
            [(found.regret[o] - found.regret[reference])[:, :, k - 1].mean(1) for o in others], 1
        )
        for k in after
    }
    shown = after[len(after) // 2]
    # By the mean over the others, so that what goes well and badly stands together.
    order = np.argsort(differences[shown].mean(1), kind="stable")
    figure = go.Figure()
    for k in after:
        figure.add_heatmap(
            z=differences[k][order],
            x=others,
            y=[found.problems[row] for row in order],
            zmid=0,
            zmin=-0.5,
            zmax=0.5,
            colorscale=[[0, "#b91c1c"], [0.5, "#f8fafc"], [1, _REFERENCE]],
            colorbar={"title": "regret", "thickness": 14},
            hovertemplate="%{y} · %{x}: %{z:+.3f}<extra></extra>",
            visible=k == shown,
            xgap=1,
            ygap=1,
        )
    buttons = [
        {
            "label": f"after {k}",
            "method": "update",
            "args": [{"visible": [other == k for other in after]}],
        }
        for k in after
    ]
    figure.update_layout(
        template="plotly_white",
        font=_FONT,
        height=160 + max(120, 17 * len(order)),
        margin={"l": 190, "r": 20, "t": 70, "b": 90},
        updatemenus=[
            {
                "buttons": buttons,
                "active": list(after).index(shown),
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "pad": {"b": 12},
            }
        ],
    )
    figure.update_yaxes(tickfont={"size": 11}, dtick=1)
    figure.update_xaxes(tickangle=-35, automargin=True)
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 1180px;
  margin: 40px auto; padding: 0 20px; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin: 40px 0 0; font-size: 18px; }}
p {{ color: #64748b; margin: 4px 0; }}
</style></head><body>
{body}
</body></html>
"""
