"""Tables as HTML: a caption, heads that say what they head, and a region that scrolls by keyboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: a figure, small print below it, and whether it is the best of its kind."""

    text: str
    small: str = ""
    best: bool = False
    span: int = 1


NOTHING = Cell("\N{EN DASH}")


def table(
    caption: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], kind: str = ""
) -> str:
    """A table whose first column stays in sight.

    Args:
        caption: What it shows.
        heads: Of all columns, the first included.
        rows: The row's name and its cells.
        kind: A class for the style sheet.
    """
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in rows
    )
    return (
        f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    span = f' colspan="{cell.span}"' if cell.span > 1 else ""
    return f"<td{span}>{text}{small}</td>"


def folded(summary: str, content: str, *, opened: bool = False) -> str:
    """What shows when it is asked for."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(summary)}</summary>{content}</details>"


def section(name: str, title: str, content: str) -> str:
    """A part of the page that can be linked to; nothing where it has no content."""
    if not content:
        return ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>'
        f"{content}</section>"
    )


def number(value: float) -> str:
    """A score as tables show it."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference as tables show it."""
    return f"{value:+.3f}"


def p_value(value: float) -> str:
    """A p value as tables show it."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
