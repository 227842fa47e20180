"""LLaVA's JSON or JSON lines, with images in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from extract.sources.base import SOURCES, Skipped, Source, stat_files, text_of
from pipeline.errors import UserError
from pipeline.manifest import sha256_file
from pipeline.records import Record, Text


@SOURCES.register("llava_json")
class LlavaJson(Source):
    """Entries `{"id", "image", "conversations"}`; those of one image become one record.

    Args:
        path: A `.json` list or a `.jsonl` file.
        images: Folder that the `image` fields are relative to.
    """

    path: Path
    images: Path

    def records(self) -> Iterator[Record | Skipped]:
        """Yield one record an image, in order of first mention, after what had to be skipped."""
        texts: dict[str, list[Text]] = {}
        for place, entry in self._entries:
            if isinstance(entry, Skipped):
                yield entry
                continue
            image = entry.get("image") if isinstance(entry, dict) else None
            if not isinstance(image, str) or not image:
                yield Skipped(place, "it names no image")
                continue
            if Path(image).is_absolute() or ".." in Path(image).parts:
                yield Skipped(place, f"its image '{image}' lies outside 'images'")
                continue
            try:
                image.encode()
                text = text_of(entry, self.split)
            except ValueError as error:
                yield Skipped(place, str(error))
                continue
            if text in texts.setdefault(image, []):
                yield Skipped(place, f"the same text about '{image}' came before")
            else:
                texts[image].append(text)
        for image, about in texts.items():
            yield Record(image, self.images / image, tuple(about))

    def identity(self) -> dict[str, Any]:
        """Content of the JSON; name, size and time of the images it names."""
        names = self._names()
        return {
            "name": "llava_json",
            "split": self.split,
            "texts": sha256_file(self.path),
            "images": stat_files(self.images / name for name in names),
        }

    def size(self) -> int:
        """Number of different images named."""
        return len(self._names())

    def _names(self) -> list[str]:
        images = (entry.get("image") for _, entry in self._entries if isinstance(entry, dict))
        return list(dict.fromkeys(name for name in images if name and isinstance(name, str)))

    @cached_property
    def _entries(self) -> list[tuple[str, Any]]:
        """Each entry with its place in the file; a line that is not JSON is a `Skipped`."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"{self.path}: no such file; set 'path' to the LLaVA JSON") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 ({error}); convert it first") from None
        if self.path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            return [self._line(f"{self.path}:{number}", line) for number, line in lines if line.strip()]
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise UserError(f"{self.path}: not valid JSON: {error}") from None
        if not isinstance(entries, list):
            raise UserError(f"{self.path}: expected a list of entries, found {type(entries).__name__}")
        return [(f"{self.path}[{number}]", entry) for number, entry in enumerate(entries)]

    @staticmethod
    def _line(place: str, line: str) -> tuple[str, Any]:
        try:
            return place, json.loads(line)
        except ValueError as error:
            return place, Skipped(place, f"not valid JSON: {error}")
