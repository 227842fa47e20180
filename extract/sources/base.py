"""What a source of records is: an iterator, and a fingerprint of the files behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Options
from pipeline.manifest import fingerprint
from pipeline.records import Record, Text, caption, from_llava
from pipeline.registry import Registry


@dataclass(frozen=True)
class Skipped:
    """Something that could not become a record: where it is and why."""

    place: str
    reason: str


class Source(Options, ABC):
    """A silo's images and texts on disk."""

    split: Literal["train", "validation", "test"] = "train"

    @abstractmethod
    def records(self) -> Iterator[Record | Skipped]:
        """Yield records in an order that is always the same."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON value that changes when the silo's images or texts do."""

    @abstractmethod
    def size(self) -> int | None:
        """Number of images where it is known without reading them all."""


def stat_files(paths: Iterable[Path]) -> str:
    """SHA-256 over name, size and modification time of files; a missing file counts as such."""
    facts = []
    for path in paths:
        try:
            stat = path.stat()
            facts.append([path.name, stat.st_size, stat.st_mtime_ns])
        except OSError:
            facts.append([path.name, None, None])
    return fingerprint(facts)


def text_of(entry: Any, split: str) -> Text:
    """Read one text: a string, `{"caption": ...}` or LLaVA's `{"conversations": [...]}`.

    Raises:
        ValueError: It is none of these, empty, or not valid Unicode.
    """
    if isinstance(entry, str):
        text = caption(entry.strip(), split)
    elif isinstance(entry, dict) and "conversations" in entry:
        text = from_llava(entry["conversations"], split)
    elif isinstance(entry, dict) and isinstance(entry.get("caption"), str):
        text = caption(entry["caption"].strip(), split)
    else:
        raise ValueError("neither 'conversations' nor 'caption' is in it")
    if not all(turn.content.strip() for turn in text.turns):
        raise ValueError("a text in it is empty")
    text.encode()
    return text


SOURCES: Registry[Source] = Registry("source", "extract.sources")
