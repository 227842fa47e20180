"""LLaVA's JSON or JSON lines, with images in a folder; either may lie behind a URL."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from fedcmp.extract.sources.base import (
    NO_FILE,
    SOURCES,
    Pair,
    Skipped,
    Source,
    image_name,
    no_such_file,
    said_before,
    stat_images,
    text_of,
)
from fedcmp.extract.sources.json_entries import (
    BLANK,
    CHUNK,
    first_value,
    line_entries,
    line_entry,
    list_entries,
)
from fedcmp.extract.sources.json_index import Index, Mark, index_of
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.records import Record
from fedcmp.pipeline.remote import Location

_Read = Callable[[int], tuple[str, Any]]
_File = BufferedReader | BufferedRandom


@SOURCES.register("llava_json")
class LlavaJson(Source):
    """Entries `{"id", "image", "conversations"}`; those of one image become one record.

    The file is read once to find where the entries of each image stand, and then an image at a time, so it
    must not change meanwhile. Of one behind a URL there is a copy among the temporary files.

    Args:
        path: A `.json` list or a `.jsonl` file.
        images: Folder that the `image` fields are relative to, or lead into.
    """

    path: Location
    images: Location
    _indexed: tuple[tuple[int, ...], Index] | None = PrivateAttr(None)

    def records(self) -> Iterator[Record | Skipped]:
        """Yield one record an image, in order of first mention, after what had to be skipped."""
        with self._opened() as (index, read):
            for number in map(int, index.left_out):
                item = self._pair(*read(number))
                if item is not None:
                    yield said_before(item) if isinstance(item, Pair) else item
            for numbers in index.images():
                pairs = [self._pair(*read(number)) for number in numbers]
                about = [pair for pair in pairs if isinstance(pair, Pair)]
                image = about[0].image
                yield Record(image, self.images / image, tuple(pair.text for pair in about))

    def pairs(self) -> Iterator[Pair | Skipped]:
        """Yield one pair an entry, in their order."""
        with self._opened() as (index, read):
            for number in range(index.entries):
                item = self._pair(*read(number))
                if item is not None:
                    yield item

    def identity(self) -> dict[str, Any]:
        """Content of the JSON; name, size and time of the images it names."""
        with self._file() as file:
            file.seek(0)
            texts = hashlib.file_digest(file, "sha256").hexdigest()
        images = stat_images(self.images, self._names())
        return {"name": "llava_json", "split": self.split, "texts": texts, "images": images}

    def size(self) -> int:
        """Number of different images named."""
        with self._opened() as (index, _):
            return len(index.named)

    def _names(self) -> Iterator[str]:
        with self._opened() as (index, read):
            for number in map(int, index.named):
                yield self._image(read(number)[1])

    def _pair(self, place: str, entry: Any) -> Pair | Skipped | None:
        if entry is BLANK:
            return None
        if isinstance(entry, Skipped):
            return entry
        try:
            return Pair(place, self._image(entry), text_of(entry, self.split), entry)
        except ValueError as error:
            return Skipped(place, str(error))

    def _image(self, entry: Any) -> str:
        named = entry.get("image") if isinstance(entry, dict) else None
        return image_name(named, "images", self.images)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Index, _Read]]:
        """The index of what the file holds now, and what reads an entry, after its place, by its number.

        Raises:
            UserError: The file is unusable; or, of reading, it has changed since.
        """
        with self._file() as file:
            state = _state(file)
            if self._indexed is None or self._indexed[0] != state:
                file.seek(0)
                entries = line_entries if self._has_lines else list_entries
                index = index_of(map(self._mark, entries(file, str(self.path))), state[0])
                self._require(file, state)
                self._indexed = state, index
            index = self._indexed[1]

            def read(number: int) -> tuple[str, Any]:
                begin, end = index.offsets[number : number + 2].tolist()
                data = os.pread(file.fileno(), end - begin, begin)
                self._require(file, state)
                if self._has_lines:
                    place = f"{self.path}:{number + 1}"
                    return place, line_entry(data, place, str(self.path), begin)
                return f"{self.path}[{number}]", first_value(data.decode())

            yield index, read

    def _mark(self, item: tuple[int, Any]) -> Mark:
        byte, entry = item
        image = None
        try:
            image = self._image(entry)
            return Mark(byte, image, text_of(entry, self.split))
        except ValueError:
            return Mark(byte, image)

    @property
    def _has_lines(self) -> bool:
        return self.path.suffix == ".jsonl"

    def _require(self, file: _File, state: tuple[int, ...]) -> None:
        if _state(file) != state:
            raise UserError(f"{self.path}: it was written to while it was read; run again to go on")

    @contextmanager
    def _file(self) -> Iterator[_File]:
        """The file, or its copy on this machine, at any place in it."""
        if not isinstance(self.path, Path):
            yield self._copy
            return
        try:
            file = self.path.open("rb")
        except NO_FILE:
            raise no_such_file(self.path, "path") from None
        with file:
            yield file

    @cached_property
    def _copy(self) -> BufferedRandom:
        """A copy without a name, which is gone with this process or source, whatever ends it."""
        assert not isinstance(self.path, Path)
        copy = tempfile.TemporaryFile()
        weakref.finalize(self, copy.close)
        try:
            with self.path.open() as there:
                shutil.copyfileobj(there, copy, CHUNK)
            copy.flush()
        except NO_FILE:
            raise no_such_file(self.path, "path") from None
        except OSError as error:
            why = one_line(error)
            raise UserError(f"{self.path}: no copy in {tempfile.gettempdir()}: {why}; set TMPDIR") from None
        return copy


def _state(file: _File) -> tuple[int, ...]:
    """Size, time and number of an open file, which tell that it was replaced or written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino
