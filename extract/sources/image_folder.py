"""A folder of pictures with captions from a CSV or JSON lines file, or from `.txt` files beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from fedcmp.extract.sources import (
    IMAGE_SUFFIXES,
    SOURCES,
    Pair,
    Skipped,
    Source,
    by_image,
    hash_file,
    image_name,
    image_names,
    json_lines,
    printable,
    read_lines,
    stat_files,
    stat_images,
    text_of,
)
from fedcmp.extract.sources.folder import Found, look_through
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.records import Record, Text
from fedcmp.pipeline.remote import Location, Remote


@SOURCES.register("image_folder")
class ImageFolder(Source):
    """Pictures in a folder and its subfolders; several texts an image are encoded once.

    Args:
        path: The folder.
        captions: CSV (`.csv`, `.tsv`) or JSON lines; without it `a/b.jpg` has its caption in `a/b.txt`.
        image_column: Column or key with the picture's path relative to the folder.
        text_column: Column or key with the caption; JSON lines may have `conversations` or `messages`
            instead.
        only: A text file with the path of a picture on every line: these pictures and no others,
            whatever their suffix, and without any text.
    """

    path: Location
    captions: Location | None = None
    only: Location | None = None
    image_column: str = "image"
    text_column: str = "caption"

    def records(self) -> Iterator[Record | Skipped]:
        """Yield one record a picture: in order of first mention, or of names without a captions file."""
        if self.captions is not None:
            yield from by_image(self.pairs(), self.path)
            return
        if self.only is None:
            yield from self._inside.skipped
        for name in self._listed:
            try:
                _checked(name)
            except ValueError as error:
                yield Skipped(printable(str(self.path / name)), str(error))
        for name in self._pictures:
            texts: tuple[Text, ...] = ()
            beside = None if self.only is not None else self._text_of(name)
            if beside is not None:  # a picture without may be for benchmarks only
                try:
                    texts = (text_of(beside.read_bytes().decode("utf-8-sig"), self.split),)
                except ValueError as error:
                    yield Skipped(str(beside), f"{error}; its picture is left out too")
                    continue
            yield Record(name, self.path / name, texts)

    def pairs(self) -> Iterator[Pair | Skipped]:
        """Yield one pair a row of the captions file."""
        for place, row in self._rows:
            if isinstance(row, Skipped):
                yield row
                continue
            try:
                if not isinstance(row, dict):
                    raise ValueError("it is no object with columns")
                image = image_name(row.get(self.image_column), "path", self.path)
                entry = row if self._has_turns(row) else row.get(self.text_column)
                if entry is None:
                    raise ValueError(f"it has no '{self.text_column}'")
                yield Pair(place, image, text_of(entry, self.split), row)
            except ValueError as error:
                yield Skipped(place, str(error))

    def identity(self) -> dict[str, Any]:
        """Content of the captions; name, size and time of the pictures and of texts beside them."""
        identity: dict[str, Any] = {"name": "image_folder", "split": self.split}
        if self.captions is None:
            names = self._pictures
            identity |= {"names": names, "images": stat_images(self.path, names)}
            if self.only is not None:
                return identity | {"texts": None}
            if isinstance(self.path, Remote):
                beside = [self._inside.texts.get(_stem(name), f"{_stem(name)}.txt") for name in names]
                return identity | {"texts": stat_images(self.path, beside)}
            texts = (self._text_of(name) or self.path / f"{_stem(name)}.txt" for name in names)
            return identity | {"texts": stat_files(texts)}
        return identity | {
            "columns": [self.image_column, self.text_column],
            "texts": hash_file(self.captions, "captions"),
            "images": stat_images(self.path, self._named),
        }

    def size(self) -> int:
        """Number of different pictures."""
        return len(self._pictures if self.captions is None else self._named)

    def _has_turns(self, row: dict[str, Any]) -> bool:
        return self.text_column not in row and not {"conversations", "messages"}.isdisjoint(row)

    def _text_of(self, name: str) -> Location | None:
        beside = self._inside.texts.get(_stem(name))
        return None if beside is None else self.path / beside

    @property
    def _named(self) -> list[str]:
        rows = (row for _, row in self._rows if isinstance(row, dict))
        return image_names((row.get(self.image_column) for row in rows), "path", self.path)

    @cached_property
    def _inside(self) -> Found:
        if isinstance(self.path, Path) and not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; set 'path' to the folder of pictures")
        found = look_through(self.path)
        if not found.pictures:
            why = f"; {found.skipped[0].place}: {found.skipped[0].reason}" if found.skipped else ""
            raise UserError(f"{self.path}: no picture ({', '.join(IMAGE_SUFFIXES)}) in it{why}")
        return found

    @cached_property
    def _listed(self) -> list[str]:
        """Names of pictures, also of those that cannot be used, each once."""
        if self.only is None:
            return self._inside.pictures
        lines = (line.rstrip("\r") for line in read_lines(self.only, "only").split("\n"))
        return list(dict.fromkeys(line for line in lines if line))

    @cached_property
    def _pictures(self) -> list[str]:
        return [name for name in self._listed if _is_usable(name)]

    @cached_property
    def _rows(self) -> list[tuple[str, Any]]:
        """Each row of the captions file with its place."""
        assert self.captions is not None
        text = read_lines(self.captions, "captions")
        if self.captions.suffix == ".jsonl":
            return list(json_lines(self.captions, text))
        if self.captions.suffix not in (".csv", ".tsv"):
            raise UserError(f"captions = {self.captions}: expected a .csv, .tsv or .jsonl file")
        return list(self._csv_rows(text))

    def _csv_rows(self, text: str) -> Iterator[tuple[str, Any]]:
        reader = csv.reader(io.StringIO(text, newline=""), dialect="excel")
        if str(self.captions).endswith(".tsv"):
            reader = csv.reader(io.StringIO(text, newline=""), dialect="excel-tab")
        header = next(reader, [])
        for column, option in ((self.image_column, "image_column"), (self.text_column, "text_column")):
            if column not in header:
                raise UserError(
                    f"{self.captions}: no column '{column}'{did_you_mean(column, header)}; set '{option}'"
                )
        while True:
            place = f"{self.captions}:{reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, Skipped(place, f"not valid CSV: {error}")
                continue
            if len(values) == len(header):
                yield place, dict(zip(header, values, strict=True))
            elif values:
                yield place, Skipped(place, f"{len(values)} columns where the header has {len(header)}")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _checked(name: str) -> None:
    """Require a name that a cache can hold, of a file inside the folder.

    Raises:
        ValueError: It is not.
    """
    try:
        image_name(name, "path")
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None


def _is_usable(name: str) -> bool:
    try:
        _checked(name)
    except ValueError:
        return False
    return True
