"""What a person at the terminal sees: progress with rate and time left, tables, plain lines.

Names and reasons come from files that somebody else wrote; no control character among them reaches the
terminal, so nothing can move its cursor, set its title or forge a line.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LOG_EVERY_SECONDS = 30.0
# Control, format (which can reverse text), surrogate, and line and paragraph separators.
_UNSEEN = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])
_JOINERS = frozenset("\u200c\u200d")
_BORDERS = 3


def cleaned(text: str) -> str:
    """Text on one line in which every control character is seen, as Python escapes it."""
    if text.isprintable():
        return text
    return "".join(
        ascii(each)[1:-1] if unicodedata.category(each) in _UNSEEN and each not in _JOINERS else each
        for each in text
    )


def say(text: str) -> None:
    """Print one line, unwrapped."""
    _print(Console(highlight=False, markup=False, emoji=False), text)


def complain(text: str) -> None:
    """Print one line to the standard error stream, unwrapped."""
    _print(Console(highlight=False, markup=False, emoji=False, stderr=True), text)


def _print(console: Console, text: str) -> None:
    console.print(cleaned(text), soft_wrap=True)


class Task:
    """Progress of one piece of work; `advance` as parts of it get done."""

    def __init__(self, name: str, total: int | None, unit: str, bar: Progress | None) -> None:
        self._name, self._total, self._unit, self._bar = cleaned(name), total, unit, bar
        self._id = bar.add_task(self._name, total=total, rate="") if bar else None
        self._start = self._logged = time.monotonic()
        self._done = 0
        self._note = ""

    def advance(self, number: int = 1) -> None:
        """Count `number` more units as done."""
        self._done += number
        if not self._done:
            return
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        if self._bar and self._id is not None:
            self._bar.update(self._id, advance=number, rate=self._rate(elapsed))
        elif now - self._logged > _LOG_EVERY_SECONDS:
            self._logged = now
            total = self._total if self._total is not None else "?"
            left = self._total and f", {_clock(elapsed * (self._total / self._done - 1))} left"
            say(f"{self._name}: {self._done}/{total} {self._unit}, {self._rate(elapsed)}{left or ''}")

    def note(self, text: str) -> None:
        """Show a few words beside the rate, such as the last loss."""
        self._note = f", {text}"

    def _rate(self, elapsed: float) -> str:
        rate = self._done / elapsed
        speed = f"{rate:,.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
        return speed + self._note


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


@contextmanager
def progress(name: str, total: int | None, unit: str) -> Iterator[Task]:
    """Show progress: a bar with rate and ETA on a terminal, a line every 30 s in a log."""
    if not sys.stderr.isatty():
        yield Task(name, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Task(name, total, unit, bar)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned.

    Nothing is ever cut: a table that is wider than the terminal comes in parts, each with the first
    column, or as one line a value where not even two columns have room. A log gets it whole.

    Args:
        title: What the table is about, on one line.
        columns: Heads; line breaks in them and in cells are kept.
        rows: As many cells each.
    """
    heads = _cells(columns)
    body = [_cells(row) for row in rows]
    console = Console(highlight=False, markup=False, emoji=False)
    widths = [max(map(_width, column)) + _BORDERS for column in zip(heads, *body, strict=True)]
    if not console.is_terminal:
        console.width = max(console.width, sum(widths) + 1)
    parts = _parts(widths, console.width - 1)
    if parts is None:
        _listed(console, cleaned(title), heads, body)
        return
    for number, part in enumerate(parts):
        continued = f" (part {number + 1} of {len(parts)})" if len(parts) > 1 else ""
        view = Table()
        for index in part:
            view.add_column(heads[index], justify="left" if index == 0 else "right", no_wrap=True)
        for row in body:
            view.add_row(*(row[index] for index in part))
        console.print(cleaned(title) + continued, style="bold", soft_wrap=True)
        console.print(view, width=sum(widths[index] for index in part) + 1)


def _cells(cells: Sequence[str]) -> list[str]:
    """Cells whose own line breaks are the only control characters."""
    return ["\n".join(map(cleaned, cell.split("\n"))) for cell in cells]


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def _parts(widths: Sequence[int], room: int) -> list[list[int]] | None:
    """Columns of every part, each with the first; None where one does not fit beside the first."""
    first, *others = widths
    if first + max(others, default=0) > room:
        return None
    parts: list[list[int]] = [[0]]
    used = first
    for index, width in enumerate(others, 1):
        if used + width > room:
            parts.append([0])
            used = first
        parts[-1].append(index)
        used += width
    return parts


def _listed(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A line for each cell, those after a row's first indented; the terminal breaks what is longer."""
    console.print(title, style="bold", soft_wrap=True)
    for row in rows:
        for index, (head, cell) in enumerate(zip(heads, row, strict=True)):
            indent, label, value = "  " * (index > 0), " ".join(head.split("\n")), " ".join(cell.split("\n"))
            fits = cell_len(indent + label + value) + 2 <= console.width
            for line in [f"{label}: {value}"] if fits else [f"{label}:", f"  {value}"]:
                console.print(indent + line, soft_wrap=True)
