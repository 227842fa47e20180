"""What a person at the terminal sees: progress with rate and time left, tables, plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LOG_EVERY_SECONDS = 30.0


def say(text: str) -> None:
    """Print one line, unwrapped."""
    Console(highlight=False, markup=False, emoji=False).print(text, soft_wrap=True)


class Task:
    """Progress of one piece of work; `advance` as parts of it get done."""

    def __init__(self, name: str, total: int | None, unit: str, bar: Progress | None) -> None:
        self._name, self._total, self._unit, self._bar = name, total, unit, bar
        self._id = bar.add_task(name, total=total, rate="") if bar else None
        self._start = self._logged = time.monotonic()
        self._done = 0

    def advance(self, number: int = 1) -> None:
        """Count `number` more units as done."""
        self._done += number
        now = time.monotonic()
        rate = f"{self._done / max(now - self._start, 1e-9):,.1f} {self._unit}/s"
        if self._bar and self._id is not None:
            self._bar.update(self._id, advance=number, rate=rate)
        elif now - self._logged > _LOG_EVERY_SECONDS:
            self._logged = now
            total = self._total if self._total is not None else "?"
            say(f"{self._name}: {self._done}/{total} {self._unit}, {rate}")


@contextmanager
def progress(name: str, total: int | None, unit: str) -> Iterator[Task]:
    """Show progress: a bar with rate and ETA on a terminal, a line every 30 s in a log."""
    if not sys.stderr.isatty():
        yield Task(name, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Task(name, total, unit, bar)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    view = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        view.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        view.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, markup=False, emoji=False, width=width).print(view)
