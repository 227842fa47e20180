"""Small charts as inline SVG, so that the report is one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[tuple[int, float]]]

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
_WIDTH, _HEIGHT = 340, 210
_LEFT, _BOTTOM, _TOP = 44, 24, 8
_CELL = 22


def _colour(client: str, clients: Sequence[str]) -> str:
    return _COLOURS[clients.index(client) % len(_COLOURS)]


def legend(clients: Sequence[str]) -> str:
    """Coloured keys of the clients."""
    return "".join(
        f'<span class=key style="background:{_colour(client, clients)}"></span>{escape(client)}'
        for client in clients
    )


def lines(series: Series, clients: Sequence[str], values: Sequence[float]) -> str:
    """One line a client over rounds, on a logarithmic scale that spans `values`."""
    low, high = math.log10(max(min(values), 1e-6)), math.log10(max(*values, 1e-5))
    last = max(round_ for points in series.values() for round_, _ in points)

    def x(round_: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * (round_ - 1) / max(last - 1, 1)

    def y(value: float) -> float:
        share = (math.log10(max(value, 1e-6)) - low) / max(high - low, 1e-9)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    parts = []
    for tick in _ticks(10**low, 10**high):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#8884"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for round_ in sorted({1, (1 + last) // 2, last}):
        parts.append(f'<text x="{x(round_):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{round_}</text>')
    for client, points in series.items():
        path = " ".join(f"{x(round_):.1f},{y(value):.1f}" for round_, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="2" '
            f'stroke="{_colour(client, clients)}"><title>{escape(client)}</title></polyline>'
        )
    return _svg(_WIDTH, _HEIGHT, parts)


def _ticks(low: float, high: float) -> list[float]:
    """1-2-5 ticks within a range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def dots(rows: Mapping[str, Sequence[float]], label: str) -> str:
    """One row a name with a dot a value and a bar at their mean, on a logarithmic scale."""
    everything = [value for values in rows.values() for value in values]
    low, high = math.log10(max(min(everything), 1e-6)), math.log10(max(*everything, 1e-5))
    left, width = 130, 620

    def x(value: float) -> float:
        return left + 10 + (width - left - 20) * (math.log10(max(value, 1e-6)) - low) / max(high - low, 1e-9)

    bottom = _CELL * len(rows) + 8
    parts = []
    for tick in _ticks(10**low, 10**high):
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
    return _svg(
        width, bottom + 36, ['<g font-family="sans-serif" font-size="12" fill="#888">', *parts, "</g>"]
    )


def heat_map(series: Series) -> str:
    """One row a client, one column a round; opacity is the value in [0, 1]."""
    width = 80 + _CELL * max(round_ for points in series.values() for round_, _ in points)
    parts = []
    for row, (client, points) in enumerate(series.items()):
        top = row * _CELL
        parts.append(f'<text x="74" y="{top + 15}" text-anchor="end">{escape(client)}</text>')
        for round_, value in points:
            parts.append(
                f'<rect x="{80 + (round_ - 1) * _CELL}" y="{top + 1}" width="{_CELL - 2}" '
                f'height="{_CELL - 2}" fill="#4269d0" fill-opacity="{0.06 + 0.94 * value:.2f}">'
                f"<title>{escape(client)}, round {round_}: {value:.2f}</title></rect>"
            )
    return _svg(width, _CELL * len(series), parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'
