"""What benchmarks over tables share: columns, filters, pictures inside the table, and scores by group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from fedcmp.evaluate.benchmarks.base import Benchmark, Item, averaged, averaged_by, collect
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, attempt, file_name
from fedcmp.evaluate.official.pictures import picture, picture_name, write_pictures
from fedcmp.evaluate.official.tables import Row, cell, filled, table, text
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.records import Text

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

Cell = bool | int | float | str
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
# VLMEvalKit's column of ids; a picture's cell may name another row by it.
_INDEX = "index"
Asked = tuple[Text, dict[str, Any], tuple[str, ...]]


class Columns(Options):
    """Names of a table's columns; without `id` a row's number is its id."""

    id: str | None = None
    image: str = "image"


class Tabular(Benchmark, ABC):
    """A benchmark over the rows of a table.

    Pictures are files in a folder, or in the table itself; then extracting writes them into the folder,
    under names that are the hashes of their content.

    Args:
        path: The table, or a pattern of several files: JSON, JSON lines, CSV, TSV or parquet.
        columns: The names of its columns.
        where: Only rows that have these values in these columns; of a list of values one.
        group: Columns by whose values scores are also given.
        image_name: How a cell of the image column becomes the file name that the cache knows.
    """

    path: Path
    columns: Columns = Columns()
    where: dict[str, Cell | tuple[Cell, ...]] = Field(default_factory=dict)
    group: Names = ()
    image_name: str = "{image_id}"

    @property
    def grouping(self) -> list[str]:
        """Columns whose values are kept with the truth."""
        return [*self.group]

    @abstractmethod
    def asked(self, row: Row, place: str) -> Asked:
        """What is asked about a row's picture, the truth as a mapping, and options to rank.

        Raises:
            UserError: A column is missing, or a cell does not hold what it should.
        """

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item a row that `where` lets through."""
        inside: dict[str, str] = {}

        def make(row: Row, place: str) -> Item:
            image = self._image(row, place, inside)
            said, truth, options = self.asked(row, place)
            name = str(row.number) if self.columns.id is None else filled(row, self.columns.id, place)
            if self.grouping:
                truth["groups"] = {each: text(cell(row, each, place)) for each in self.grouping}
            return Item(name, image, said, truth, options)

        found = collect(self._rows(inside), make)
        if not found:
            raise UserError(f"{self.path}: no row{f' fits where = {self.where}' if self.where else ''}")
        return [
            replace(each, image=inside.get(each.image, each.image)) if isinstance(each, Item) else each
            for each in found
        ]

    def unpack(self, folder: Path) -> None:
        """Write the pictures that are in the table and asked about; those that are there stay."""
        wanted = {each.image for each in self.items(None) if isinstance(each, Item)}
        rows = table(self.path, "questions", {self.columns.image})
        found = (_embedded(row, self.columns.image, place) for place, row in rows)
        named = ((picture_name(each), each) for each in found if each is not None)
        write_pictures((pair for pair in named if pair[0] in wanted), folder)

    def _rows(self, inside: dict[str, str]) -> Iterator[tuple[str, Row | Problem]]:
        """Rows that are let through; names of pictures that other rows may refer to go into `inside`."""
        for place, row in table(self.path, "questions", self._needed()):
            if isinstance(row, Row) and isinstance(row.cells.get(self.columns.image), str):
                found = _embedded(row, self.columns.image, place) if _INDEX in row.cells else None
                if found is not None:
                    inside[text(row.cells[_INDEX])] = picture_name(found)
            fits = isinstance(row, Problem) or attempt(self._fits, row, place)
            if fits is not False:
                yield place, fits if isinstance(fits, Problem) else row

    def _needed(self) -> set[str]:
        named: set[str] = {_INDEX, *self.where, *self.grouping}
        for value in self.columns.model_dump().values():
            named |= {value} if isinstance(value, str) else {*(value or ())}
        return named

    def _fits(self, row: Row, place: str) -> bool:
        return all(
            _same(cell(row, column, place), wanted if isinstance(wanted, tuple) else (wanted,))
            for column, wanted in self.where.items()
        )

    def _image(self, row: Row, place: str, inside: Mapping[str, str]) -> str:
        named = picture(cell(row, self.columns.image, place), f"{place}, '{self.columns.image}'")
        if isinstance(named, bytes):
            return picture_name(named)
        if str(named) in inside:
            return str(named)
        try:
            name = file_name(self.image_name, named)
        except UserError:
            # Tables of texts have numbers as texts, too.
            if not str(named).isdecimal():
                raise
            name = file_name(self.image_name, int(named))
        return str(PurePosixPath(name))


class Judged(Tabular, ABC):
    """A table whose answers are right, wrong or something between.

    Args:
        together: Metrics by their names, each with columns: the share of groups of rows with the same values
            there in which all answers are right.
    """

    together: dict[str, Annotated[Names, Field(min_length=1)]] = Field(default_factory=dict)

    @property
    def grouping(self) -> list[str]:
        """Columns whose values are kept with the truth."""
        joined = [column for columns in self.together.values() for column in columns]
        return list(dict.fromkeys([*self.group, *joined]))

    def by_group(
        self, items: Sequence[Item], values: Sequence[float], name: str = "accuracy"
    ) -> dict[str, Metric]:
        """The mean of every group, as `name column value`."""
        metrics: dict[str, Metric] = {}
        for column in self.group:
            groups = [item.truth["groups"][column] or "none" for item in items]
            metrics |= averaged_by(f"{name} {column}", items, values, groups)
        return metrics

    def all_right(self, items: Sequence[Item], points: Sequence[float]) -> dict[str, Metric]:
        """The metrics of `together`; groups are resampled, not their images."""
        metrics: dict[str, Metric] = {}
        for name, columns in self.together.items():
            groups: dict[str, float] = {}
            for item, point in zip(items, points, strict=True):
                key = " / ".join(item.truth["groups"][column] for column in columns)
                groups[key] = min(groups.get(key, 1.0), float(point >= 1))
            metrics[name] = averaged([], list(groups.values()), list(groups))
        return metrics


def _embedded(row: Row | Problem, column: str, place: str) -> bytes | None:
    """The picture that a row holds; what is wrong with it is said where it is asked about."""
    if isinstance(row, Problem):
        return None
    try:
        found = picture(row.cells.get(column), place)
    except UserError:
        return None
    return found if isinstance(found, bytes) else None


def _same(value: Any, wanted: Sequence[Cell]) -> bool:
    """Whether a cell is one of some values; tables of texts have numbers and truth values as texts."""
    try:
        found = text(value)
    except UserError:
        return False
    return any(
        found.lower() == text(each) if isinstance(each, bool) else found == text(each) for each in wanted
    )
