"""The figure of a comparison: loss, accuracy, final accuracy, and parameters against accuracy."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from optuna_lora_rl.study.charts import INK
from optuna_lora_rl.study.charts import Series
from optuna_lora_rl.study.charts import chart

_PANEL = (560, 400)
_GAP, _HEAD = 24, 30
_LEFT, _RIGHT, _BOTTOM = 150, 24, 44


@dataclass(frozen=True)
class Drawn:
    """One arm in the figure.

    Attributes:
        name: Of the arm.
        color: Its colour.
        loss: (step, validation loss).
        accuracy: (step, token accuracy).
        final: Mean final accuracy, with the ends of its interval.
        parameters: At the end, and at their most.
    """

    name: str
    color: str
    loss: Sequence[tuple[float, float]]
    accuracy: Sequence[tuple[float, float]]
    final: tuple[float, float, float]
    parameters: tuple[float, float]


def figure(
    arms: Sequence[Drawn],
    *,
    title: str,
    loss: str,
    accuracy: str,
    legend: Sequence[tuple[str, str]],
) -> str:
    """Return the SVG.

    Args:
        arms: In the order of the third panel, from the top.
        title: One line over all.
        loss: What the loss is, for the axis.
        accuracy: What the accuracy is, for the axis.
        legend: Names and colours.
    """
    width, height = 2 * _PANEL[0] + 3 * _GAP, 2 * (_PANEL[1] + _HEAD) + 3 * _GAP + 60
    panels = [
        ("Loss", _curves(arms, "loss", loss)),
        ("Accuracy", _curves(arms, "accuracy", accuracy)),
        ("Final accuracy, with 95% intervals", _dots(arms, accuracy)),
        (
            "Parameters at the end (dot) and at their most (line), against final accuracy",
            _against(arms, accuracy),
        ),
    ]
    body = [f'<text x="{_GAP}" y="30" font-size="16" fill="{INK}">{html.escape(title)}</text>']
    body += _legend(legend, width)
    for number, (name, drawn) in enumerate(panels):
        x = _GAP + (number % 2) * (_PANEL[0] + _GAP)
        y = 84 + (number // 2) * (_PANEL[1] + _HEAD + _GAP)
        body.append(f'<text x="{x}" y="{y}" font-size="14" fill="{INK}">{name}</text>')
        place = f'<svg x="{x}" y="{y + 8}" width="{_PANEL[0]}" height="{_PANEL[1]}" '
        body.append(drawn.replace("<svg ", place, 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(body)}</svg>'
    )


def _curves(arms: Sequence[Drawn], which: str, name: str) -> str:
    lines = [Series(getattr(arm, which), color=arm.color, width=1.6) for arm in reversed(arms)]
    return chart(lines, x="optimizer steps", y=name, size=_PANEL)


def _against(arms: Sequence[Drawn], name: str) -> str:
    found = []
    for arm in arms:
        end, most = (count / 1000 for count in arm.parameters)
        accuracy = arm.final[0]
        said = (
            f"{arm.name}: {end:.1f} thousand parameters, {most:.1f} at their most, {accuracy:.3f}"
        )
        found.append(Series([(end, accuracy), (most, accuracy)], color=arm.color, width=1.4))
        dot = Series([(end, accuracy)], color=arm.color, line=False, dots=True, titles=[said])
        found.append(dot)
    return chart(found, x="thousand parameters", y=name, size=_PANEL)


def _legend(entries: Sequence[tuple[str, str]], width: int) -> list[str]:
    found, x, y = [], _GAP, 50
    for name, color in entries:
        needed = 24 + 7 * len(name)
        if x + needed > width - _GAP:
            x, y = _GAP, y + 16
        found.append(f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{color}"/>')
        found.append(f'<text x="{x + 16}" y="{y}" fill="{INK}">{html.escape(name)}</text>')
        x += needed
    return found


def _round_values(low: float, high: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 6)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _dots(arms: Sequence[Drawn], name: str) -> str:
    """One row an arm: a dot and its interval."""
    width, height = _PANEL
    ends = [end for arm in arms for end in arm.final]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    row = (height - _BOTTOM) / len(arms)

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (width - _LEFT - _RIGHT)

    body = []
    for tick in _round_values(low, high):
        at = across(tick)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - _BOTTOM}" ')
        body.append('stroke="#e2e8f0"/>')
        body.append(f'<text x="{at:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle" ')
        body.append(f'fill="{INK}">{tick:.4g}</text>')
    for number, arm in enumerate(arms):
        y = (number + 0.5) * row
        body.append(f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end" fill="{INK}">')
        body.append(f"{html.escape(arm.name)}</text>")
        mean, *interval = (across(value) for value in arm.final)
        body.append(f'<line x1="{interval[0]:.1f}" x2="{interval[1]:.1f}" y1="{y:.1f}" ')
        body.append(f'y2="{y:.1f}" stroke="{arm.color}" stroke-width="2"/>')
        body.append(f'<circle cx="{mean:.1f}" cy="{y:.1f}" r="4.5" fill="{arm.color}"/>')
    body.append(f'<text x="{(_LEFT + width) / 2}" y="{height - 6}" text-anchor="middle" ')
    body.append(f'fill="{INK}">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {width} {height}">{"".join(body)}</svg>'
