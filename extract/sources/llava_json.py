"""LLaVA's JSON or JSON lines, with images in a folder; either may lie behind a URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from fedcmp.extract.sources import (
    SOURCES,
    Pair,
    Skipped,
    Source,
    by_image,
    hash_file,
    image_name,
    image_names,
    json_lines,
    read_lines,
    stat_images,
    text_of,
)
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record
from fedcmp.pipeline.remote import Location


@SOURCES.register("llava_json")
class LlavaJson(Source):
    """Entries `{"id", "image", "conversations"}`; those of one image become one record.

    Args:
        path: A `.json` list or a `.jsonl` file.
        images: Folder that the `image` fields are relative to, or lead into.
    """

    path: Location
    images: Location

    def records(self) -> Iterator[Record | Skipped]:
        """Yield one record an image, in order of first mention, after what had to be skipped."""
        return by_image(self.pairs(), self.images)

    def pairs(self) -> Iterator[Pair | Skipped]:
        """Yield one pair an entry, in their order."""
        for place, entry in self._entries:
            if isinstance(entry, Skipped):
                yield entry
                continue
            try:
                named = entry.get("image") if isinstance(entry, dict) else None
                image = image_name(named, "images", self.images)
                yield Pair(place, image, text_of(entry, self.split), entry)
            except ValueError as error:
                yield Skipped(place, str(error))

    def identity(self) -> dict[str, Any]:
        """Content of the JSON; name, size and time of the images it names."""
        return {
            "name": "llava_json",
            "split": self.split,
            "texts": hash_file(self.path, "path"),
            "images": stat_images(self.images, self._names()),
        }

    def size(self) -> int:
        """Number of different images named."""
        return len(self._names())

    def _names(self) -> list[str]:
        entries = (entry for _, entry in self._entries if isinstance(entry, dict))
        return image_names((entry.get("image") for entry in entries), "images", self.images)

    @cached_property
    def _entries(self) -> list[tuple[str, Any]]:
        """Each entry with its place in the file; a line that is not JSON is a `Skipped`."""
        text = read_lines(self.path, "path")
        if self.path.suffix == ".jsonl":
            return list(json_lines(self.path, text))
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: not valid JSON: {error}") from None
        if not isinstance(entries, list):
            raise UserError(f"{self.path}: expected a list of entries, found {type(entries).__name__}")
        return [(f"{self.path}[{number}]", entry) for number, entry in enumerate(entries)]
