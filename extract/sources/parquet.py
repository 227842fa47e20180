"""Tables as Hugging Face has them: Parquet or what `datasets` saved, with pictures inside or beside.

They are read in a process of its own, as damage can crash the library that reads them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PrivateAttr

from fedcmp.extract.sources import (
    SOURCES,
    Location,
    Record,
    Skipped,
    Source,
    Text,
    UserError,
    stat_files,
    stat_images,
    texts_of,
)
from fedcmp.extract.sources.arrow import damaged, opened
from fedcmp.extract.sources.cells import bytes_in, name_in, path_in, texts_in
from fedcmp.extract.sources.columns import Columns, listed, recognise
from fedcmp.extract.sources.saved import tables_of
from fedcmp.extract.sources.shards import Names
from fedcmp.pipeline.apart import apart
from fedcmp.pipeline.errors import one_line

# Each with the label of its row.
_Texts = dict[Text, str | int | None]


@dataclass
class _Reading:
    """The file that is being read: a sign of life, and what a crash is put down to."""

    shard: str

    def __str__(self) -> str:
        return self.shard


@dataclass(frozen=True)
class _Row:
    """A row of a file; cells are read when they are asked for."""

    shard: str
    number: int
    columns: Columns
    batch: Any
    place: int

    def cell(self, column: str) -> Any:
        """As Python has it.

        Raises:
            Exception: Nearly anything, on damaged files.
        """
        return self.batch.column(column)[self.place].as_py()


@dataclass(frozen=True)
class _Picture:
    """A row, or several one after another with the same picture.

    Attributes:
        shard: The file.
        row: Number of the first row in it.
        name: None where it has none.
        content: What tells whether it is the same as another of this name.
        image: The encoded file, or where to read it.
        texts: What is said about it.
    """

    shard: str
    row: int
    name: str | None
    content: bytes | str
    image: bytes | Location
    texts: _Texts

    @property
    def key(self) -> tuple[str | None, bytes | str]:
        """Equal for the same picture."""
        return self.name, self.content


@SOURCES.register("parquet")
class Parquet(Source):
    """Rows with a picture and what is said about it; the same picture under the same name is one record.

    Args:
        path: A Parquet file, a glob, a brace pattern, a folder of Parquet files, or one that
            `Dataset.save_to_disk` has written; all of them also as URLs.
        image: Column of pictures: structs of bytes and path, encoded files, or paths, or lists of one.
        text: Column of texts: captions, lists of captions, LLaVA's turns, or a chat's messages.
        id: Column of pictures' names; by default their own paths, or row numbers.
        images: Folder that paths of pictures are relative to, or lead into.
    """

    path: str
    image: str | None = None
    text: str | None = None
    id: str | None = None
    images: Location | None = None
    _label: str | None = PrivateAttr(None)

    def labelled(self, column: str) -> Parquet:
        """The same, whose records have what a column says beside each text as `labels`."""
        copy = self.model_copy()
        copy._label = column
        return copy

    def records(self) -> Iterator[Record | Skipped]:
        """Yield pictures in order of first mention, a few rows in memory at a time."""
        return self._apart(Parquet.records_here)

    def identity(self) -> dict[str, Any]:
        """Name, size and time (URLs: version) of every file and of the pictures beside, and the columns."""
        identity: dict[str, Any] = {
            "name": "parquet",
            "split": self.split,
            "columns": [self.image, self.text, self.id],
            "shards": stat_files(tables_of(self.path)),
        }
        if self.images is not None:
            names = dict.fromkeys(self._apart(Parquet._paths))
            identity["images"] = stat_images(self.images, list(names))
        return identity

    def size(self) -> int | None:
        """Number of rows, which may be more than pictures; unknown where it would have to be counted."""
        (rows,) = self._apart(Parquet._size)
        return rows

    def _apart(self, function: Callable[[Parquet], Iterator[Any]]) -> Iterator[Any]:
        reading = _Reading(self.path)
        for item in apart(reading, function, self):
            if isinstance(item, _Reading):
                reading.shard = item.shard
            else:
                yield item

    def records_here(self) -> Iterator[Record | Skipped | _Reading]:
        """The same in this process, which a damaged file may crash, with a sign of life now and then."""
        several = yield from self._several()
        about: dict[tuple[str | None, bytes | str], _Texts] = {}
        for item in self._pictures() if several else ():
            if isinstance(item, _Reading):
                yield item
            elif isinstance(item, _Picture) and item.name in several:
                if item.key in about:
                    yield from _joined(about[item.key], item)
                else:
                    about[item.key] = item.texts
        names = Names()
        for item in self._pictures():
            if not isinstance(item, _Picture):
                yield item
                continue
            texts = about.pop(item.key, None) if item.name in several else item.texts
            if texts is not None:
                yield _record(item, texts, names)

    def _several(self) -> Generator[_Reading, None, set[str]]:
        """Names that rows have which are not one after another."""
        seen: set[str] = set()
        several: set[str] = set()
        last = None
        for row in self._rows("names"):
            if isinstance(row, _Reading):
                yield row
            elif isinstance(row, _Row):
                name = _or_none(self._name, row)
                if name is not None and (row.shard, name) != last:
                    (several if name in seen else seen).add(name)
                last = (row.shard, name)
        return several

    def _paths(self) -> Iterator[str | _Reading]:
        """Paths of pictures relative to `images`."""
        for row in self._rows("paths"):
            if isinstance(row, _Reading):
                yield row
            elif isinstance(row, _Row) and (path := _or_none(self._path, row)):
                yield path

    def _size(self) -> Iterator[int | _Reading | None]:
        rows: int | None = 0
        for shard in dict.fromkeys(tables_of(self.path)):
            yield _Reading(str(shard))
            try:
                with opened(shard) as table:
                    rows = None if rows is None or table.rows is None else rows + table.rows
            except Exception as error:  # pyarrow raises nearly anything on damaged files
                damaged(shard, "", error)
        yield rows

    def _pictures(self) -> Iterator[_Picture | Skipped | _Reading]:
        """Each row's picture; rows one after another with the same one are joined."""
        held: _Picture | None = None
        unused: Counter[str] = Counter()
        for row in self._rows():
            item = self._picture(row, unused) if isinstance(row, _Row) else row
            if not isinstance(item, _Picture):
                yield item
            elif held is not None and (held.shard, held.key) == (item.shard, item.key):
                yield from _joined(held.texts, item)
            else:
                if held is not None:
                    yield held
                held = item
        if held is not None:
            yield held
        for shard, number in unused.items():
            yield Skipped(shard, f"{number} system messages, whose place the LLM's template takes")

    def _picture(self, row: _Row, unused: Counter[str]) -> _Picture | Skipped:
        place = f"{row.shard}[{row.number}]"
        try:
            data = bytes_in(row.cell(row.columns.image))
            content, image = self._beside(row) if data is None else (hashlib.sha256(data).digest(), data)
            name = self._name(row)
            texts: tuple[Text, ...] = ()
            system = False
            label = None if row.columns.label is None else row.cell(row.columns.label)
            if row.columns.answers:
                texts = texts_of(self._preference(row), self.split)
            elif row.columns.text is not None:
                texts, system = texts_in(row.cell(row.columns.text), self.split)
        except MemoryError:
            raise
        except Exception as error:  # pyarrow raises nearly anything on damaged files
            return Skipped(place, f"cannot be read: {one_line(error)}")
        unused.update({row.shard: 1} if system else {})
        return _Picture(row.shard, row.number, name, content, image, dict.fromkeys(texts, label))

    def _preference(self, row: _Row) -> dict[str, Any]:
        """What is asked, and the answers."""
        asked = {} if row.columns.text is None else {"prompt": row.cell(row.columns.text)}
        return asked | {column: row.cell(column) for column in row.columns.answers}

    def _name(self, row: _Row) -> str | None:
        if row.columns.id is not None:
            name = row.cell(row.columns.id)
            return None if name is None else str(name)
        return _or_none(self._path, row) or name_in(row.cell(row.columns.image))

    def _beside(self, row: _Row) -> tuple[str, Location]:
        """A picture's path relative to `images`, and where it lies."""
        if self.images is None:
            raise ValueError("its picture is only named; set 'images' to the folder of pictures")
        path = path_in(row.cell(row.columns.image), self.images)
        return path, self.images / path

    def _path(self, row: _Row) -> str | None:
        return None if self.images is None else path_in(row.cell(row.columns.image), self.images)

    def _rows(self, only: Literal["names", "paths"] | None = None) -> Iterator[_Row | Skipped | _Reading]:
        """Rows of all files, of those that can be read at all, in order.

        Args:
            only: Read no more than is needed for names of rows or for paths of pictures.
        """
        known: Columns | None = None
        for shard in dict.fromkeys(tables_of(self.path)):
            reading = _Reading(str(shard))
            yield reading
            try:
                with opened(shard) as table:
                    columns = self._columns(table.schema, str(shard))
                    if known is None and columns.text is None and not columns.answers:
                        there = listed(table.schema.names)
                        yield Skipped(str(shard), f"no column of texts among {there}; set 'text' to its name")
                    if known is None and columns.text is None and columns.answers:
                        there = listed(table.schema.names)
                        yield Skipped(
                            str(shard),
                            f"no column of questions among {there}: preferences are between captions, unless "
                            "'text' names it",
                        )
                    if known not in (None, columns):
                        raise UserError(
                            f"{shard}: it has {columns}, and files before have {known}; split the silo"
                        )
                    known = columns
                    for first, batch in table.batches(*columns.wanted(only)):
                        yield reading
                        if isinstance(batch, Skipped):
                            yield batch
                            continue
                        for place in range(batch.num_rows):
                            yield _Row(str(shard), first + place, columns, batch, place)
            except Exception as error:  # pyarrow raises nearly anything on damaged files
                yield damaged(shard, "", error)

    def _columns(self, schema: Any, shard: str) -> Columns:
        columns = recognise(schema, shard, image=self.image, text=self.text, id=self.id, label=self._label)
        if columns.named == "paths" and self.images is None:
            raise UserError(
                f"{shard}: '{columns.image}' holds paths of pictures; set 'images' to the folder that they "
                "are relative to"
            )
        return columns


def _joined(texts: _Texts, item: _Picture) -> Iterator[Skipped]:
    """Add what is said about a picture to what was said about it before."""
    place = f"{item.shard}[{item.row}]"
    if not item.texts:
        yield Skipped(place, "the same picture came before")
    for text, label in item.texts.items():
        if text in texts:
            yield Skipped(place, "the same text about the same picture came before")
        texts.setdefault(text, label)


def _record(item: _Picture, texts: _Texts, names: Names) -> Record | Skipped:
    row = f"{item.row:09d}"
    name = names.take(item.shard, item.name or row) or names.take(item.shard, f"{row}/{item.name}")
    if name is None:
        return Skipped(f"{item.shard}[{item.row}]", f"other pictures are called '{item.name}', too")
    return Record(name, item.image, tuple(texts), tuple(texts.values()))


def _or_none(function: Callable[[_Row], str | None], row: _Row) -> str | None:
    """What is said of a row where it can be read; where not, that is said when all of it is read."""
    try:
        return function(row)
    except MemoryError:
        raise
    except Exception:  # pyarrow raises nearly anything on damaged files
        return None
