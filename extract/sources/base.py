"""What a source of records is: an iterator, and a fingerprint of the files behind it."""

from __future__ import annotations

import hashlib
import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint_all, sha256_file
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.records import Record, Text, caption, from_chat, from_llava, from_preference
from fedcmp.pipeline.registry import Registry
from fedcmp.pipeline.remote import Location, Remote

NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# What every Pillow reads; a list of its own would depend on the machine.
IMAGE_SUFFIXES = tuple(
    "jpg jpeg png webp bmp tif tiff gif jpe jfif jp2 j2k jpx avif apng dib pbm pgm ppm pnm tga".split()
)
# Pictures all the same, to be named where they are left out.
OTHER_IMAGE_SUFFIXES = tuple(
    "heic heif jxl svg dcm dicom nii psd exr hdr ico icns eps pcx sgi dds raw dng cr2 cr3 nef arw orf rw2 "
    "ndpi svs mrxs czi npy".split()
)


@dataclass(frozen=True)
class Skipped:
    """Something that could not become a record: where it is and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """One text about one image: where it stands, the image's relative path, and the entry as it was read."""

    place: str
    image: str
    text: Text
    entry: Any


class Source(Options, ABC):
    """A silo's images and texts, on disk or behind URLs."""

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


def stat_files(paths: Iterable[Path | Remote]) -> str:
    """SHA-256 over name, size and time (URLs: version) of files; a missing file counts as such."""
    return fingerprint_all(map(_stat_of, paths))


def _stat_of(path: Path | Remote) -> list[Any]:
    if isinstance(path, Remote):
        return [path.name, *(path.facts() or (None, None))]
    try:
        stat = path.stat()
        return [path.name, stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [path.name, None, None]


def stat_images(folder: Location, names: Iterable[str]) -> str:
    """The same for files of a folder, which is listed once where it lies behind a URL."""
    if not isinstance(folder, Remote):
        return stat_files(folder / name for name in names)
    there = folder.listing()
    return fingerprint_all([name, *there.get(name, (None, None))] for name in names)


def hash_file(path: Location, option: str) -> str:
    """SHA-256 of a file that an option names.

    Raises:
        UserError: It does not exist.
    """
    try:
        if isinstance(path, Remote):
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return sha256_file(path)
    except NO_FILE:
        raise no_such_file(path, option) from None


def no_such_file(path: Location, option: str) -> UserError:
    """The error that a file which an option names does not exist."""
    return UserError(f"{path}: no such file; set '{option}' to it")


def read_lines(path: Location, option: str) -> str:
    """A text file of a source, whole.

    Args:
        path: The file.
        option: The option that names it, for the error.

    Raises:
        UserError: It does not exist or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except NO_FILE:
        raise no_such_file(path, option) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it first") from None


def json_lines(path: Location, text: str) -> Iterator[tuple[str, Any]]:
    """Each entry of JSON lines with its place; a line that is not JSON is a `Skipped`."""
    # Not splitlines: U+2028 and its like end no line of JSON.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, json_line(place, line)


def json_line(place: str, line: str) -> Any:
    """The entry in a line of JSON lines; a `Skipped` where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Skipped(place, f"not valid JSON: {error}")


def image_name(value: Any, option: str, folder: Location | None = None) -> str:
    """The path of an image relative to its folder, so that one file has one name.

    Args:
        value: A path, absolute or relative to the folder, or a list of one.
        option: The option that names the folder, for the error.
        folder: The folder, where absolute paths may lead into it.

    Raises:
        ValueError: It is no path, there are several, or it leads out of the folder.
    """
    if isinstance(value, list) and len(value) > 1:
        raise ValueError(f"it names {len(value)} images; one is read")
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ValueError("it names no image")
    path = value
    if isinstance(folder, Path) and posixpath.isabs(path):
        path = posixpath.relpath(path, folder.absolute())
    elif isinstance(folder, Remote) and path.startswith(f"{str(folder).rstrip('/')}/"):
        path = path.removeprefix(f"{str(folder).rstrip('/')}/")
    path = posixpath.normpath(path)
    if posixpath.isabs(path) or path.split("/")[0] in ("..", ".") or "\0" in path:
        raise ValueError(f"its image '{value}' lies outside '{option}'")
    path.encode()
    return path


def printable(name: str) -> str:
    """A name for people, also where its bytes are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def image_names(values: Iterable[Any], option: str, folder: Location | None = None) -> list[str]:
    """The different names among values that `image_name` accepts, in their order."""
    names: dict[str, None] = {}
    for value in values:
        try:
            names[image_name(value, option, folder)] = None
        except ValueError:
            continue
    return list(names)


def by_image(pairs: Iterable[Pair | Skipped], folder: Location) -> Iterator[Record | Skipped]:
    """One record an image, in order of first mention, after what had to be skipped."""
    texts: dict[str, list[Text]] = {}
    for pair in pairs:
        if isinstance(pair, Skipped):
            yield pair
        elif pair.text in texts.setdefault(pair.image, []):
            yield said_before(pair)
        else:
            texts[pair.image].append(pair.text)
    for image, about in texts.items():
        yield Record(image, folder / image, tuple(about))


def said_before(pair: Pair) -> Skipped:
    """A pair that says nothing new."""
    return Skipped(pair.place, f"the same text about '{pair.image}' came before")


def texts_of(entries: Any, split: str) -> tuple[Text, ...]:
    """Read the texts of one image: one text, a list of turns (LLaVA's or a chat's), or a list of texts.

    Raises:
        ValueError: One of them is not a text.
    """
    if not isinstance(entries, list):
        entries = [entries]
    elif entries and all(isinstance(entry, dict) and "from" in entry for entry in entries):
        entries = [{"conversations": entries}]
    elif entries and all(isinstance(entry, dict) and "role" in entry for entry in entries):
        entries = [{"messages": entries}]
    return tuple(dict.fromkeys(text_of(entry, split) for entry in entries))


def text_of(entry: Any, split: str) -> Text:
    """Read one text: a string, `{"caption": ...}`, `{"conversations": [...]}` or `{"messages": [...]}`.

    With `chosen` and `rejected` it is a preference between two answers.

    Raises:
        ValueError: It is none of these, empty, or not valid Unicode.
    """
    if isinstance(entry, str):
        text = caption(entry.strip(), split)
    elif isinstance(entry, dict) and {"chosen", "rejected"} <= entry.keys():
        text = from_preference(entry, split)
    elif isinstance(entry, dict) and "conversations" in entry:
        text = from_llava(entry["conversations"], split)
    elif isinstance(entry, dict) and isinstance(entry.get("caption"), str):
        text = caption(entry["caption"].strip(), split)
    elif isinstance(entry, dict) and "messages" in entry:
        text = from_chat(entry["messages"], split)
    else:
        raise ValueError("neither 'conversations', 'messages' nor 'caption' is in it")
    if not all(content.strip() for content in _said(text)):
        raise ValueError("a text in it is empty")
    text.encode()
    return text


def _said(text: Text) -> list[str]:
    return [turn.content for turn in text.turns] + ([] if text.rejected is None else [text.rejected])


SOURCES: Registry[Source] = Registry("source", "fedcmp.extract.sources")
