"""A figure of every client in every round as colours; two dozen clients and a hundred rounds fit."""

from __future__ import annotations

from collections.abc import Mapping

from fedcmp.evaluate.report.charts import svg, text

# Cividis, told apart with any colour vision and in grey: low is dark blue, high is yellow.
_RAMP = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173",
    "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip
_LETTER, _ROW, _TOP = 6.6, 17, 30


def heat_map(
    title: str, figures: Mapping[str, Mapping[int, float]], rounds: int, high: float, name: str
) -> str:
    """One row a client, one column a round; a client that was not there in a round is hatched.

    Args:
        title: What the chart shows.
        figures: Values in [0, high], by client and round (from 1).
        rounds: How many there are.
        high: The value of the brightest colour.
        name: Of the chart, unlike that of any other on a page.
    """
    left = 14 + _LETTER * max(map(len, figures))
    cell = min(max(640 / rounds, 6.0), 24.0)
    width = max(left + cell * rounds + 14, 420)
    cells: dict[int | None, list[str]] = {}
    parts = [text(8, 16, title, weight=600)]
    for row, (client, values) in enumerate(figures.items()):
        y = _TOP + row * _ROW
        parts.append(text(left - 6, y + 12, client, "end"))
        for number in range(rounds):
            value = values.get(number + 1)
            level = None if value is None else _level(value, high)
            cells.setdefault(level, []).append(
                f"M{left + number * cell:.1f} {y}h{cell - 1:.1f}v{_ROW - 2}h-{cell - 1:.1f}z"
            )
    bottom = _TOP + len(figures) * _ROW
    hatch = f"url(#absent-{name})"
    # A path a colour: thousands of cells are some kilobytes.
    for level, places in cells.items():
        fill = hatch if level is None else _RAMP[level]
        kind = "absent" if level is None else "cells"
        parts.append(f'<path class="{kind}" fill="{fill}" d="{"".join(places)}"/>')
    step = next(by for by in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if by * cell >= 24 or by == 1000)
    for number in [1, *range(step if step > 1 else 2, rounds + 1, step)]:
        parts.append(text(left + (number - 0.5) * cell, bottom + 12, str(number), "middle"))
    parts.append(text(left + cell * rounds / 2, bottom + 28, "round", "middle"))
    y = bottom + 46
    for level, colour in enumerate(_RAMP):
        parts.append(f'<rect x="{left + level * 16}" y="{y}" width="16" height="12" fill="{colour}"/>')
    parts.append(text(left, y + 26, "0"))
    parts.append(text(left + 160, y + 26, f"{high:.2g}", "end"))
    parts.append(
        f'<rect x="{left + 190}" y="{y}" width="24" height="12" fill="{hatch}" stroke="currentColor"/>'
    )
    parts.append(text(left + 220, y + 11, "absent"))
    pattern = (
        f'<pattern id="absent-{name}" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0V5" stroke="currentColor" stroke-opacity=".45" '
        'stroke-width="1.6"/></pattern>'
    )
    return svg(
        width, y + 34, [f"<defs>{pattern}</defs>", *parts], f"{title}. {_told(figures, rounds)}", least=576
    )


def _level(value: float, high: float) -> int:
    return min(max(int(value / high * len(_RAMP)), 0), len(_RAMP) - 1) if high > 0 else 0


def _told(figures: Mapping[str, Mapping[int, float]], rounds: int) -> str:
    told = []
    for client, values in figures.items():
        mean = f"mean {sum(values.values()) / len(values):.2f}" if values else "never there"
        absent = rounds - len(values)
        told.append(
            f"{client}: {mean}" + (f", absent in {absent} of {rounds} rounds" if absent and values else "")
        )
    return "; ".join(told) + "."
