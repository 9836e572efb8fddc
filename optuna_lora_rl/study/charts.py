"""Small charts as SVG text, for the report and the dashboard, without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

SIZE = (640, 320)
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
        hollow: Whether the marks are rings.
        steps: Whether the line goes on level until the next point.
        width: Width of the line, in pixels.
        titles: What a browser says of each point under the pointer.
        band: Triples (x, low, high), filled behind the rest.
    """

    points: Sequence[tuple[float, float]]
    color: str = ACCENT
    line: bool = True
    dots: bool = False
    hollow: bool = False
    steps: bool = False
    width: float = 2.0
    titles: Sequence[str] = ()
    band: Sequence[tuple[float, float, float]] = ()


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    size: tuple[int, int] = SIZE,
    ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """An SVG picture of ``series`` with axes called ``x`` and ``y``.

    Args:
        series: What is drawn, the first at the bottom.
        x: Of the horizontal axis.
        y: Of the vertical axis.
        size: Width and height in pixels; text keeps its size.
        ticks: Places on the horizontal axis and what stands there; by default round values, and
            whole ones where all of ``series`` are whole.
    """
    known = [point for one in series for point in one.points if _finite(point)]
    known += [(px, end) for one in series for px, *ends in one.band for end in ends]
    if not known:
        return ""
    width, height = size
    across = _Scale.over((p[0] for p in known), _LEFT, width - _RIGHT)
    up = _Scale.over((p[1] for p in known), height - _BOTTOM, _TOP)
    if ticks is None:
        whole = all(float(p[0]).is_integer() for p in known)
        ticks = [(tick, f"{tick:.4g}") for tick in across.ticks(1.0 if whole else 0.0)]
    body = [*_axes(across, up, x, y, ticks)]
    for one in series:
        body += _draw(one, across, up)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
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

    def ticks(self, finest: float = 0.0) -> list[float]:
        """About five round values, at least ``finest`` apart."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = max(finest, min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough)))
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def _axes(
    across: _Scale, up: _Scale, x: str, y: str, ticks: Sequence[tuple[float, str]]
) -> Iterable[str]:
    right, bottom = across.end, up.start
    for tick in up.ticks():
        at = up(tick)
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" '
        yield 'stroke="#e2e8f0"/>'
        yield f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{INK}">'
        yield f"{tick:.4g}</text>"
    for tick, said in ticks:
        yield f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle" '
        yield f'fill="{INK}">{html.escape(said)}</text>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{bottom + _BOTTOM - 6}" text-anchor="middle" '
    yield f'fill="{INK}">{html.escape(x)}</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle" '
    yield f'fill="{INK}">{html.escape(y)}</text>'


def _draw(series: Series, across: _Scale, up: _Scale) -> Iterable[str]:
    if series.band:
        edge = [(px, high) for px, _, high in series.band]
        edge += [(px, low) for px, low, _ in reversed(series.band)]
        corners = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py in edge)
        yield f'<polygon points="{corners}" fill="{series.color}" fill-opacity="0.15"/>'
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
            look = f'fill="{series.color}"'
            if series.hollow:
                look = f'fill="none" stroke="{series.color}" stroke-width="1.5"'
            yield f'<circle cx="{across(point[0]):.1f}" cy="{up(point[1]):.1f}" r="4" '
            yield f"{look}><title>{html.escape(title)}</title></circle>"


def _finite(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) for value in point)
