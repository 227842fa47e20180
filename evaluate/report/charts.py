"""Small charts as inline SVG, so that the report is one file that needs no network.

Each is whole by itself, with title, axes and legend: it can be saved and put into a paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Series = Mapping[str, Sequence[tuple[int, float]]]

# Okabe and Ito's, told apart with any colour vision; the text's own colour for black, the yellow darkened.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor", "#B8A800")
_DASHES = ("", "7 3", "2 2", "9 3 2 3")
_LETTER = 6.6
_CELL = 22
# A span of more than this factor is shown on a logarithmic scale.
_LOGARITHMIC = 20.0


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of the drawing."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, 1e-12))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * share

    @property
    def ticks(self) -> list[float]:
        """Round numbers in the range: five or so, or the 1-2-5 of every decade."""
        if self.logarithmic:
            return _decades(self.low, self.high)
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * by for by in (1, 2, 5, 10) if size * by >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def lines(
    title: str, series: Series, unit: str, within: Sequence[float] | None = None, width: int = 460
) -> str:
    """One line a name over rounds, with axes, ticks and a legend below.

    Args:
        title: What the chart shows.
        series: Points (round, value) by name, in the order of the legend.
        unit: What values are, on their axis.
        within: Values that the axis spans, by default those of the series.
        width: Of the drawing, in pixels.
    """
    values = within or [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > _LOGARITHMIC
    left, right, top, height = 52, width - 12, 30, 230
    y = Axis(low, high, height, top, logarithmic)
    last = max(round_ for points in series.values() for round_, _ in points)
    x = Axis(1, max(last, 2), left, right)
    parts = [text(left, 16, title, weight=600)]
    for tick in y.ticks:
        parts.append(_rule(left, right, y(tick), y(tick)))
        parts.append(text(left - 6, y(tick) + 4, f"{tick:.4g}", "end"))
    for tick in sorted({1, *(tick for tick in x.ticks if tick >= 1 and tick == int(tick)), last}):
        # The last round is always told; a tick that would lie under it is not.
        if tick == last or x(last) - x(tick) > 22:
            parts.append(_tick(x(tick), height))
            parts.append(text(x(tick), height + 17, f"{tick:g}", "middle"))
    parts.append(
        f'<path d="M{left} {top}V{height}H{right}" fill="none" stroke="currentColor" stroke-opacity=".6"/>'
    )
    parts.append(text((left + right) / 2, height + 34, "round", "middle"))
    scale = f"{unit}, logarithmic" if logarithmic else unit
    middle = (top + height) / 2
    parts.append(text(12, middle, scale, "middle", turned=True))
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x(round_):.1f},{y(value):.1f}" for round_, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="2" {_stroke(number)}>'
            f"<title>{escape(name)}</title></polyline>"
        )
        if len(points) == 1:
            parts.append(
                f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" {_fill(number)}/>'
            )
    keys, bottom = _legend([*series], left, right, height + 52)
    told = ", ".join(f"{name} ends at {points[-1][1]:.3g}" for name, points in series.items())
    return svg(width, bottom, [*parts, *keys], f"{title}. {unit} by round. {told}.")


def _legend(names: Sequence[str], left: float, right: float, top: float) -> tuple[list[str], float]:
    """Keys of lines in columns, and where they end."""
    wide = 34 + _LETTER * max(map(len, names))
    columns = max(1, min(len(names), int((right - left + 12) // wide)))
    parts = []
    for number, name in enumerate(names):
        x, y = left + number % columns * wide, top + number // columns * 18
        parts.append(f'<path d="M{x:.1f} {y - 4}h22" stroke-width="2.5" {_stroke(number)}/>')
        parts.append(text(x + 27, y, name))
    return parts, top + (-(-len(names) // columns) - 1) * 18 + 8


def _stroke(number: int) -> str:
    dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _fill(number: int) -> str:
    return f'fill="{COLOURS[number % len(COLOURS)]}"'


@dataclass(frozen=True)
class Span:
    """A value with its interval.

    Attributes:
        value: The value.
        low: Lower end.
        high: Upper end.
        told: What a mouse and a screen reader are told.
        good: Whether it is better or worse than 0; None where neither is clear, which is drawn hollow.
    """

    value: float
    low: float
    high: float
    told: str
    good: bool | None


def forest(title: str, rows: Mapping[str, Mapping[str, Span]], unit: str, width: int = 500) -> str:
    """Values with their intervals about 0: a block with its own scale a measure, a row a run.

    Args:
        title: What the chart shows.
        rows: By measure and run.
        unit: What values are.
        width: Of the drawing, in pixels.
    """
    longest = max(len(name) for block in rows.values() for name in block)
    left, right = 20 + _LETTER * longest, width - 24
    parts, y = [text(8, 16, title, weight=600)], 22.0
    for number, (name, good) in enumerate(_GOOD.items()):
        parts += [_dot(left + number * 80, 36, good), text(left + number * 80 + 9, 40, name)]
    for measure, block in rows.items():
        edge = max(max(abs(span.low), abs(span.high)) for span in block.values()) or 1.0
        axis = Axis(-edge, edge, left, right)
        y += 44
        parts.append(text(8, y, measure, weight=600))
        top, bottom = y + 6, y + 14 + 20 * len(block)
        for tick in axis.ticks:
            middle = abs(tick) < edge * 1e-6
            parts.append(_rule(axis(tick), axis(tick), top, bottom, strong=middle))
            parts.append(text(axis(tick), bottom + 14, "0" if middle else f"{tick:+.3g}", "middle"))
        for name, span in block.items():
            y += 20
            parts.append(text(left - 8, y + 4, name, "end"))
            ends = f"M{axis(span.low):.1f} {y}H{axis(span.high):.1f}"
            parts.append(
                f'<g><title>{escape(span.told)}</title><path d="{ends}" stroke="{_COLOUR_OF[span.good]}" '
                f'stroke-width="2"/>{_dot(axis(span.value), y, span.good)}</g>'
            )
        y = bottom
    parts.append(text((left + right) / 2, y + 34, unit, "middle"))
    told = "; ".join(span.told for block in rows.values() for span in block.values())
    return svg(width, y + 42, parts, f"{title}. {told}.")


_GOOD = {"better": True, "worse": False, "no clear difference": None}
_COLOUR_OF = {True: COLOURS[0], False: COLOURS[1], None: "currentColor"}


def _dot(x: float, y: float, good: bool | None) -> str:
    colour = _COLOUR_OF[good]
    inside = "none" if good is None else colour
    # Not by colour alone: what is worse is square.
    if good is False:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{inside}" stroke="{colour}" stroke-width="2"/>'


def dots(rows: Mapping[str, Sequence[float]], label: str) -> str:
    """One row a name with a dot a value and a bar at their mean, on a logarithmic scale."""
    everything = [value for values in rows.values() for value in values]
    low, high = max(min(everything), 1e-6), max(*everything, 1e-5)
    left, width = 130, 620
    x = Axis(low, high, left + 10, width - 10, logarithmic=True)
    bottom = _CELL * len(rows) + 8
    parts = []
    for tick in x.ticks:
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{bottom}" stroke="#8884"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>'
        )
    for row, (name, values) in enumerate(rows.items()):
        middle = row * _CELL + _CELL / 2
        parts.append(f'<text x="{left}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
        mean = x(sum(values) / len(values))
        parts.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{middle - 8}" y2="{middle + 8}" '
            'stroke="#ff725c" stroke-width="3"/>'
        )
        parts += [
            f'<circle cx="{x(v):.1f}" cy="{middle}" r="3" fill="#4269d0" opacity=".7"/>' for v in values
        ]
    parts.append(
        f'<text x="{(left + width) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(label)}</text>'
    )
    group = ['<g font-family="sans-serif" font-size="12" fill="#888">', *parts, "</g>"]
    size = f'viewBox="0 0 {width} {bottom + 36}" width="{width}" height="{bottom + 36}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(group)}</svg>'


def svg(width: float, height: float, parts: Sequence[str], told: str, least: float = 320) -> str:
    """A drawing, by itself dark on white and on a page as that is.

    Args:
        width: In pixels.
        height: In pixels.
        parts: What is drawn.
        told: What a screen reader says.
        least: Narrower than this it scrolls instead of shrinking.
    """
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(told)}" '
        f'style="min-width:{min(least, width):.0f}px" color="#1a1a1a" '
        'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect class="paper" width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def text(
    x: float, y: float, said: str, anchor: str = "start", *, weight: int = 400, turned: bool = False
) -> str:
    """A line of text that starts, ends or has its middle at a point."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor" text-anchor="{anchor}"{bold}{turn}>'
        f"{escape(said)}</text>"
    )


def _rule(x1: float, x2: float, y1: float, y2: float, *, strong: bool = False) -> str:
    opacity = ".7" if strong else ".15"
    return (
        f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="{opacity}"/>'
    )


def _tick(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y:.1f}v4" stroke="currentColor" stroke-opacity=".6"/>'
