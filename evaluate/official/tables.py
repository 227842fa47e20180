"""Tables of questions, row by row: JSON, JSON lines, CSV, TSV and parquet."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmp.evaluate.official.files import Problem, json_lines, read_json_file
from fedcmp.pipeline.errors import UserError, did_you_mean

# What pandas, with which VLMEvalKit reads its tables, takes for no value.
NO_VALUE = frozenset(["", *"#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>".split(",")]) | {
    *"N/A,NA,NULL,NaN,None,n/a,nan,null".split(",")
}


@dataclass(frozen=True)
class Row:
    """A row's cells by the names of their columns, and its number from 0 over all files."""

    number: int
    cells: dict[str, Any]


def table(
    path: Path, what: str, columns: Collection[str] | None = None
) -> Iterator[tuple[str, Row | Problem]]:
    """Every row with its place; a row that is none comes as a `Problem`.

    CSV and TSV have a head and texts alone. JSON is a list of objects, or an object in which one list of
    objects is. Of all kinds but JSON only a few rows are in memory.

    Args:
        path: A file, or a pattern of several, such as `test-*.parquet`, that are read in order.
        what: What the rows are, for error messages.
        columns: Those that are needed; of parquet no others are read.

    Raises:
        UserError: There is no such file, or it is no table.
    """
    number = 0
    for file in _files(path, what):
        read = _READERS.get(file.suffix.lower())
        if read is None:
            raise UserError(f"{file}: {what} are a table in {', '.join(_READERS)}, not '{file.suffix}'")
        for place, cells in read(file, what, columns):
            if isinstance(cells, dict):
                yield place, Row(number, cells)
            elif isinstance(cells, Problem):
                yield place, cells
            else:
                yield place, Problem(f"{place}: not an object with columns")
            number += 1


def is_table(path: Path) -> bool:
    """Whether a path is one of parquet, CSV or TSV, which no benchmark's own files are in."""
    return path.suffix.lower() in (".parquet", ".csv", ".tsv")


def cell(row: Row, column: str, place: str) -> Any:
    """A cell of a row.

    Raises:
        UserError: The table has no such column.
    """
    if column not in row.cells:
        raise UserError(f"{place}: no column '{column}'{did_you_mean(column, row.cells)}")
    return row.cells[column]


def text(value: Any) -> str:
    """A cell's value as text, empty where there is none.

    Raises:
        UserError: It is a list or a table.
    """
    if isinstance(value, dict | list | bytes):
        raise UserError(f"{type(value).__name__} in place of a text")
    if value is None or value != value:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def filled(row: Row, column: str, place: str) -> str:
    """The text of a cell that must have one.

    Raises:
        UserError: There is no such column, or its cell is empty or no text.
    """
    try:
        found = text(cell(row, column, place))
    except UserError as error:
        raise error if str(error).startswith(place) else UserError(f"{place}, '{column}': {error}") from None
    if not found:
        raise UserError(f"{place}: '{column}' is empty")
    return found


def _files(path: Path, what: str) -> list[Path]:
    if path.is_file() or not {*path.name} & {*"*?["}:
        return [path]
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise UserError(f"{path}: {what}: no file fits this pattern")
    return found


Cells = Iterator[tuple[str, Any]]


def _json(path: Path, what: str, columns: Collection[str] | None) -> Cells:
    try:
        content = read_json_file(path, what)
    except UserError:
        # Many a file of JSON lines has this suffix.
        _, first = next(json_lines(path, what), ("", None))
        if not isinstance(first, dict):
            raise
        yield from json_lines(path, what)
        return
    if isinstance(content, dict):
        lists = {name: each for name, each in content.items() if isinstance(each, list) and each}
        rows = {name: each for name, each in lists.items() if isinstance(each[0], dict)}
        if len(rows) != 1:
            raise UserError(
                f"{path}: expected a list of {what}, or an object with one such list; its fields: "
                f"{', '.join(content) or 'none'}"
            )
        ((name, content),) = rows.items()
        path = Path(f"{path}[{name}]")
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of {what}, found {type(content).__name__}")
    for number, entry in enumerate(content):
        yield f"{path}[{number}]", entry


def _json_lines(path: Path, what: str, columns: Collection[str] | None) -> Cells:
    return json_lines(path, what)


def _separated(path: Path, what: str, columns: Collection[str] | None) -> Cells:
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    kind = "tabs" if dialect == "excel-tab" else "commas"
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict, or an open quote would swallow the rest of the file without a word.
            reader = csv.reader(file, dialect=dialect, strict=True)
            heads = next(reader, [])
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                place = f"{path}, row {number}"
                if len(cells) > len(heads):
                    yield place, Problem(f"{place}: {len(cells)} cells under {len(heads)} heads")
                else:
                    yield place, dict(zip(heads, [*cells, *[None] * (len(heads) - len(cells))], strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a table of {kind} and quotes: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not UTF-8 ({error}); convert it first") from None
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None


def _parquet(path: Path, what: str, columns: Collection[str] | None) -> Cells:
    from fedcmp.evaluate.official.parquet import parquet_rows

    for number, cells in enumerate(parquet_rows(path, what, columns), 1):
        yield f"{path}, row {number}", cells


_READERS: dict[str, Callable[[Path, str, Collection[str] | None], Cells]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
