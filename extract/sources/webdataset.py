"""webdataset shards: an image with a `.json` (LLaVA conversations) or `.txt` (caption) beside it.

Shards are opened here, from the disk or through fsspec, and read as plain tars, so no `pipe:` is ever
run, and samples are taken as bytes, so nothing in them is unpickled.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

from fedcmp.extract.sources import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    SOURCES,
    Skipped,
    Source,
    printable,
    stat_files,
    texts_of,
)
from fedcmp.extract.sources.shards import Names, damage, shards_of
from fedcmp.extract.sources.tar import files_of
from fedcmp.pipeline.records import Record
from fedcmp.pipeline.remote import Remote

_PICTURES = {*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES}
_TEXTS = frozenset({"json", "txt"})
_FILES_HELD = 64
_ANOTHER_PICTURE = "beside another picture of the sample, which is taken"
_BESIDE = {
    "json": "without a text beside a '.txt', which is taken",
    "txt": "beside a '.json' with texts, which are taken",
}
_KEY = "a sample's name ends at its first dot, as webdataset has it"


@dataclass(frozen=True)
class _File:
    """A file of a shard: `suffix` is what follows the first dot of its name, in lower case."""

    shard: str
    key: str
    suffix: str
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.shard}:{printable(self.key)}.{printable(self.suffix)}"

    def at_last_dot(self) -> _File:
        """The same under the name up to its last dot."""
        more, _, suffix = self.suffix.rpartition(".")
        return replace(self, key=f"{self.key}.{more}" if more else self.key, suffix=suffix)


@SOURCES.register("webdataset")
class WebDataset(Source):
    """`.tar` shards; the `.json` of a sample is one entry, one list of turns or a list of entries.

    Args:
        path: Shards as a path or URL, a glob (`train-*.tar`) or a brace pattern (`train-{000..015}.tar`).
    """

    path: str

    def records(self) -> Iterator[Record | Skipped]:
        """Yield samples in order of shards; a damaged shard is skipped from the damage on."""
        problems: list[Skipped] = []
        names = Names()
        beside: Counter[tuple[str, str]] = Counter()
        files = self._files(problems)
        for sample in _samples(files):
            yield from problems
            problems.clear()
            yield from self._record(sample, names, beside)
        yield from problems
        for (shard, suffix), number in beside.items():
            yield Skipped(shard, f"{number} '.{suffix}' {_BESIDE.get(suffix, _ANOTHER_PICTURE)}")

    def _files(self, problems: list[Skipped]) -> Iterator[_File | None]:
        """The files of all shards, None at the end of each; what is none or has no name becomes a problem."""
        for shard in dict.fromkeys(shards_of(self.path)):
            try:
                with shard.open() if isinstance(shard, Remote) else shard.open("rb") as stream:
                    for found in files_of(str(shard), stream):
                        if isinstance(found, Skipped):
                            problems.append(found)
                        elif (file := _named(str(shard), *found, problems)) is not None:
                            yield file
            except Exception as error:  # tarfile and decompressors raise nearly anything on damaged files
                problems.append(damage(shard, error))
            yield None

    def _record(
        self, files: Sequence[_File], names: Names, beside: Counter[tuple[str, str]]
    ) -> Iterator[Record | Skipped]:
        """The record of a sample, if it is one, after what is left out of it."""
        sample: dict[str, bytes] = {}
        for file in files:
            if file.suffix in sample:
                yield Skipped(file.place, "a file of this name came before")
            sample.setdefault(file.suffix, file.data)
        shard, key = files[0].shard, files[0].key
        place = f"{shard}:{printable(key)}"
        pictures = [suffix for suffix in sample if suffix.rpartition(".")[2] in _PICTURES]
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if suffix is None:
            for left_out in pictures:
                why = f"not a format that is read; {_KEY}" if "." in left_out else "not a format that is read"
                yield Skipped(f"{place}.{left_out}", why)
            if not pictures:
                yield Skipped(
                    place,
                    "no image in the sample; the files of a sample must stand together in the shard (tar "
                    f"--sort=name), and {_KEY}",
                )
            return
        beside.update((shard, left_out) for left_out in pictures if left_out != suffix)
        name = names.take(shard, f"{key}.{suffix}")
        if name is None:
            yield Skipped(place, "a sample of this name came before")
            return
        try:
            name.encode()
            about, unused = _about(sample)
            texts = texts_of(about, self.split)
        except (ValueError, RecursionError) as error:
            yield Skipped(place, f"its name or text cannot be read: {error}")
            return
        beside.update((shard, left_out) for left_out in unused)
        yield Record(name, sample[suffix], texts)

    def identity(self) -> dict[str, Any]:
        """Name, size and time (URLs: version) of every shard."""
        return {"name": "webdataset", "split": self.split, "shards": stat_files(shards_of(self.path))}

    def size(self) -> int | None:
        """Number of images by the shards' headers; unknown where shards are remote, compressed or damaged."""
        count = 0
        try:
            for shard in shards_of(self.path):
                if isinstance(shard, Remote):
                    return None
                with tarfile.open(shard, "r:") as tar:
                    count += sum(name.lower().rpartition(".")[2] in IMAGE_SUFFIXES for name in tar.getnames())
        except tarfile.TarError:
            return None
        return count


def _named(shard: str, name: str, data: bytes, problems: list[Skipped]) -> _File | None:
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    last = base.lower().rpartition(".")[2]
    if key and dot:
        used = last in _PICTURES or last in _TEXTS
        return _File(shard, f"{folder}/{key}" if folder else key, suffix.lower(), data if used else b"")
    if last in _PICTURES:
        problems.append(Skipped(f"{shard}:{printable(name)}", "its name begins with a dot"))
    return None


def _samples(files: Iterable[_File | None]) -> Iterator[list[_File]]:
    """Files of a shard that stand together and have one name, up to the first dot.

    Where several dots are in all their names, as in `scan.2024.0001.jpg`, the last one ends it instead.
    """
    held: list[_File] = []
    for file in files:
        if held and (file is None or file.key != held[0].key):
            yield from _divided(held)
            held = []
        if file is None:
            continue
        held.append(file)
        if len(held) >= _FILES_HELD and all("." in each.suffix for each in held):
            *whole, last = _divided(held)
            yield from whole
            # What was divided by its last dots may go on with the next file.
            held = held[-len(last) :]
    if held:
        yield from _divided(held)


def _divided(files: list[_File]) -> list[list[_File]]:
    if not all("." in file.suffix for file in files):
        return [files]
    return [list(run) for _, run in groupby(map(_File.at_last_dot, files), attrgetter("key"))]


def _about(sample: dict[str, bytes]) -> tuple[Any, list[str]]:
    """What a sample says of its picture, and the suffix of what is not looked at for that.

    A `.json` without a text is metadata where there is a `.txt`.
    """
    entry = json.loads(sample["json"]) if "json" in sample else []
    both = "json" in sample and "txt" in sample
    if "txt" in sample and not _tells(entry):
        return [sample["txt"].decode("utf-8-sig")], ["json"] if both else []
    return entry, ["txt"] if both else []


def _tells(entry: Any) -> bool:
    """Whether there is any text in a JSON value."""
    if isinstance(entry, list):
        return any(map(_tells, entry))
    if isinstance(entry, dict):
        turns = "conversations" in entry or "from" in entry or {"role", "content"} <= entry.keys()
        return turns or _tells(entry.get("caption")) or _tells(entry.get("messages"))
    return isinstance(entry, str) and bool(entry.strip())
