"""The figure of an explanation: one panel a parameter."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from optuna_lora_rl.samplers.explanation import Explanation
    from optuna_lora_rl.samplers.explanation import Parameter

_INK, _MEAN, _BAND, _PRIOR, _BEST = (
    "#1e293b",
    "#0f766e",
    "rgba(15,118,110,0.16)",
    "#f59e0b",
    "#b91c1c",
)
_COLUMNS = 3
_HEIGHT = 270
# Share of a panel's height that the prior may fill.
_PRIOR_HEIGHT = 0.22


def draw(explanation: Explanation) -> go.Figure:
    """Mean and 90% band along each parameter at the best trial, the trials, and the prior."""
    from plotly.subplots import make_subplots

    parameters = explanation.parameters
    columns = max(1, min(_COLUMNS, len(parameters)))
    rows = max(1, -(-len(parameters) // columns))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[f"{_plain(p.name)} · {p.importance:.0%}" for p in parameters],
        vertical_spacing=min(0.2, 75 / (_HEIGHT * rows)),
        horizontal_spacing=0.06,
        shared_yaxes="all",
    )
    low, high = _range(parameters)
    for k, parameter in enumerate(parameters):
        place = {"row": k // columns + 1, "col": k % columns + 1}
        _panel(figure, parameter, (low, high), place, legend=k == 0)
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12, "color": _INK},
        height=110 + _HEIGHT * rows,
        margin={"l": 60, "r": 20, "t": 80, "b": 40},
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top"},
    )
    figure.update_yaxes(title_text="objective", col=1)
    return figure


def _range(parameters: tuple[Parameter, ...]) -> tuple[float, float]:
    """What all panels show: all that is predicted, and room for the prior below."""
    if not parameters:
        return 0.0, 1.0
    values = np.concatenate(
        [np.concatenate([p.low, p.high, [y for _, y in p.trials + p.pruned]]) for p in parameters]
    )
    # A run that diverged would flatten everything else.
    predicted = np.concatenate([np.concatenate([p.low, p.high]) for p in parameters])
    span = float(predicted.max() - predicted.min()) or 1.0
    low = max(float(values.min()), float(predicted.min()) - 0.5 * span)
    high = min(float(values.max()), float(predicted.max()) + 0.5 * span)
    return low - (high - low) * _PRIOR_HEIGHT, high + (high - low) * 0.04


def _panel(
    figure: go.Figure,
    parameter: Parameter,
    limits: tuple[float, float],
    place: dict[str, int],
    *,
    legend: bool,
) -> None:
    choices = any(isinstance(value, str | bool) or value is None for value in parameter.values)
    x: list[Any] = [_plain(v) if choices else v for v in parameter.values]
    group: dict[str, Any] = {"showlegend": legend, **place}
    low, high = limits
    if parameter.prior is not None:
        prior = low + parameter.prior * (high - low) * _PRIOR_HEIGHT
        _prior(figure, x, prior, low, choices, group)
    if choices:
        figure.add_scatter(
            x=x,
            y=parameter.mean,
            error_y={"type": "data", "array": parameter.high - parameter.mean, "color": _MEAN},
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 16, "color": _MEAN},
            name="predicted",
            legendgroup="mean",
            showlegend=False,
            **place,
        )
    else:
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=parameter.high, showlegend=False, **edge, **place)
        figure.add_scatter(
            x=x,
            y=parameter.low,
            fill="tonexty",
            fillcolor=_BAND,
            name="90% of what is possible",
            legendgroup="band",
            **edge,
            **group,
        )
        figure.add_scatter(
            x=x,
            y=parameter.mean,
            mode="lines",
            line={"color": _MEAN, "width": 2.5},
            name="predicted, the rest as in the best trial",
            legendgroup="mean",
            **group,
        )
    for name, seen, symbol in (
        ("trials", parameter.trials, "circle"),
        ("pruned trials, as they stood", parameter.pruned, "circle-open"),
    ):
        figure.add_scatter(
            x=[_plain(v) if choices else v for v, _ in seen],
            y=[y for _, y in seen],
            mode="markers",
            marker={"size": 6, "color": _INK, "opacity": 0.45, "symbol": symbol},
            name=name,
            legendgroup=name,
            **{**group, "showlegend": legend and bool(seen)},
        )
    best = _plain(parameter.best) if choices else parameter.best
    figure.add_scatter(
        x=[best],
        y=[low + 0.02 * (high - low)],
        mode="markers",
        marker={"size": 11, "color": _BEST, "symbol": "triangle-up"},
        name="the best trial's value",
        legendgroup="best",
        **group,
    )
    figure.update_yaxes(range=[low, high], **place)
    if parameter.log and not choices:
        ticks = log_ticks(float(x[0]), float(x[-1]))
        said = [f"{tick:g}" for tick in ticks]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=said, **place)


def _plain(value: Any) -> str:
    """A name or a choice as text: plotly reads tags in it."""
    return html.escape(str(value), quote=False)


def log_ticks(low: float, high: float) -> list[float]:
    """About four round places of a logarithmic axis."""
    steps = (1.0,) if high / low > 1000 else (1.0, 2.0, 5.0) if high / low < 50 else (1.0, 3.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    places = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [place for place in places if low * 0.999 <= place <= high * 1.001]


def _prior(
    figure: go.Figure,
    x: list[Any],
    prior: np.ndarray,
    low: float,
    choices: bool,
    group: dict[str, Any],
) -> None:
    said = {"name": "usual in LoRA runs", "legendgroup": "prior", "hoverinfo": "skip"}
    if choices:
        figure.add_bar(
            x=x, y=prior - low, base=low, marker={"color": _PRIOR, "opacity": 0.4}, width=0.5,
            **said, **(group | {"showlegend": False}),
        )  # fmt: skip
        return
    floor = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    place = {key: group[key] for key in ("row", "col")}
    figure.add_scatter(x=x, y=[low] * len(x), **floor, **place)
    figure.add_scatter(
        x=x,
        y=prior,
        mode="lines",
        line={"color": _PRIOR, "width": 1},
        fill="tonexty",
        fillcolor="rgba(245,158,11,0.3)",
        **said,
        **group,
    )
