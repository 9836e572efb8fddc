"""Small charts as SVG text, for the report and the dashboard, without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44
ACCENT, QUIET, INK = "#0f766e", "#cbd5e1", "#334155"


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        points: Pairs (x, y); those that are no finite numbers are left out.
        color: Any SVG colour.
        line: Whether they are joined.
        dots: Whether each is marked.
        steps: Whether the line goes on level until the next point.
        width: Width of the line, in pixels.
        titles: What a browser says of each point under the pointer.
    """

    points: Sequence[tuple[float, float]]
    color: str = ACCENT
    line: bool = True
    dots: bool = False
    steps: bool = False
    width: float = 2.0
    titles: Sequence[str] = ()


def chart(series: Sequence[Series], *, x: str, y: str) -> str:
    """An SVG picture of ``series`` with axes called ``x`` and ``y``."""
    known = [point for one in series for point in one.points if _finite(point)]
    if not known:
        return ""
    across = _Scale.over((p[0] for p in known), _LEFT, _WIDTH - _RIGHT)
    up = _Scale.over((p[1] for p in known), _HEIGHT - _BOTTOM, _TOP)
    body = [*_axes(across, up, x, y)]
    for one in series:
        body += _draw(one, across, up)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(body)}</svg>'
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> _Scale:
        values = list(values)
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> Iterable[str]:
    for tick in up.ticks():
        at = up(tick)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
        yield 'stroke="#e2e8f0"/>'
        yield f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{INK}">'
        yield f"{tick:.4g}</text>"
    for tick in across.ticks():
        yield f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" '
        yield f'fill="{INK}">{tick:.4g}</text>'
    yield f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle" '
    yield f'fill="{INK}">{html.escape(x)}</text>'
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle" '
    yield f'fill="{INK}">{html.escape(y)}</text>'


def _draw(series: Series, across: _Scale, up: _Scale) -> Iterable[str]:
    points = [(across(px), up(py)) for px, py in filter(_finite, series.points)]
    if series.line and points:
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for px, py in points[1:]:
            path += f"H{px:.1f}V{py:.1f}" if series.steps else f"L{px:.1f} {py:.1f}"
        yield f'<path d="{path}" fill="none" stroke="{series.color}" '
        yield f'stroke-width="{series.width}" stroke-linejoin="round"/>'
    titles = [*series.titles, *[""] * len(series.points)]
    for point, title in zip(series.points if series.dots else (), titles, strict=False):
        if _finite(point):
            yield f'<circle cx="{across(point[0]):.1f}" cy="{up(point[1]):.1f}" r="4" '
            yield f'fill="{series.color}"><title>{html.escape(title)}</title></circle>'


def _finite(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) for value in point)
