"""webdataset shards: an image with a `.json` (LLaVA conversations) or `.txt` (caption) beside it.

Shards are opened here, from the disk or through fsspec, and handed to webdataset as streams, so no
`pipe:` is ever run, and samples are taken as bytes, so nothing in them is unpickled.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.sources.base import SOURCES, Skipped, Source, printable, stat_files, texts_of
from pipeline.errors import UserError
from pipeline.records import Record
from pipeline.store import Remote, is_url

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@SOURCES.register("webdataset")
class WebDataset(Source):
    """`.tar` shards; the `.json` of a sample is one entry, one list of turns or a list of entries.

    Args:
        path: Shards as a path or URL, a glob (`train-*.tar`) or a brace pattern (`train-{000..015}.tar`).
    """

    path: str

    def records(self) -> Iterator[Record | Skipped]:
        """Yield samples in order of shards; a damaged shard is skipped from the damage on."""
        # Should webdataset ever open or decode something itself, it must refuse pipes and pickles.
        os.environ["WDS_SECURE"] = "1"
        from webdataset.tariterators import group_by_keys, tar_file_expander

        problems: list[Skipped] = []

        def damaged(error: Exception) -> bool:
            if isinstance(error, UserError):
                # A lost connection is no damage: what it hides would be skipped for good.
                raise UserError(error.args[0])
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise UserError(f"{reading[-1]}: cannot be read ({error}); mend that and rerun to go on")
            problems.append(Skipped(str(reading[-1]), f"damaged shard: {error.args[0]}"))
            return True

        reading: list[Path | Remote] = []

        def opened() -> Iterator[dict[str, Any]]:
            for shard in self._shards():
                reading.append(shard)
                with shard.open() if isinstance(shard, Remote) else shard.open("rb") as stream:
                    yield {"url": str(shard), "stream": stream}

        seen: dict[str, str] = {}
        files = tar_file_expander(opened(), handler=damaged)
        for sample in group_by_keys(files, handler=damaged):
            yield from problems
            problems.clear()
            yield self._record(sample, seen)
        yield from problems

    def _record(self, sample: dict[str, Any], seen: dict[str, str]) -> Record | Skipped:
        place = f"{sample['__url__']}:{printable(sample['__key__'])}"
        suffix = next((suffix for suffix in _IMAGE_SUFFIXES if suffix in sample), None)
        if suffix is None:
            return Skipped(place, f"no image ({', '.join(_IMAGE_SUFFIXES)}) in the sample")
        name = f"{sample['__key__']}.{suffix}"
        if seen.get(name, sample["__url__"]) != sample["__url__"]:
            # Keys that start again in every shard are told apart by the shard's name.
            name = f"{Path(sample['__url__']).stem}/{name}"
        if name in seen:
            return Skipped(place, "a sample of this name came before")
        seen[name] = sample["__url__"]
        try:
            name.encode()
            if "json" in sample:
                texts = texts_of(json.loads(sample["json"]), self.split)
            else:
                texts = texts_of([sample["txt"].decode()] if "txt" in sample else [], self.split)
        except (ValueError, RecursionError) as error:
            return Skipped(place, f"its name or text cannot be read: {error}")
        return Record(name, sample[suffix], texts)

    def identity(self) -> dict[str, Any]:
        """Name, size and time (URLs: version) of every shard."""
        return {"name": "webdataset", "split": self.split, "shards": stat_files(self._shards())}

    def size(self) -> int | None:
        """Number of images by the shards' headers; unknown where shards are remote, compressed or damaged."""
        count = 0
        try:
            for shard in self._shards():
                if isinstance(shard, Remote):
                    return None
                with tarfile.open(shard, "r:") as tar:
                    count += sum(name.lower().endswith(_IMAGE_SUFFIXES) for name in tar.getnames())
        except tarfile.TarError:
            return None
        return count

    def _shards(self) -> list[Path | Remote]:
        from braceexpand import braceexpand

        shards = [shard for pattern in braceexpand(self.path) for shard in _matches(pattern)]
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{shard}: no such shard; 'path' is {self.path!r}")
        return shards


def _matches(pattern: str) -> list[Path | Remote]:
    if is_url(pattern):
        remote = Remote(pattern)
        matches = remote.glob() if glob.has_magic(pattern) else []
        return [*(matches or [remote])]
    return [Path(match) for match in sorted(glob.glob(pattern)) or [pattern]]
