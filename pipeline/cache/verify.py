"""Is a cache what its manifest says, byte for byte, and does the manifest say what can be?"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.cache import FORMAT, STATUS, CorruptCacheError, FeatureCache
from fedcmp.pipeline.cache.files import Files, Mapped, StoredZip, open_files
from fedcmp.pipeline.cache.format import (
    ABSENT,
    CRC_BYTES,
    INDEX_DTYPE,
    MANIFEST_LIMIT,
    PATCHES,
    QUANT_ARRAYS,
    SMALL_ARRAYS,
    array_metadata,
    chunk_bytes,
    crc,
    crc_bytes,
    parse_manifest,
    render_manifest,
    require_patches,
    shard_name,
)
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.signature import SIGNATURE
from fedcmp.pipeline.records import KINDS, Text

_BLOCK = 1 << 22
_NOT_FINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_METADATA_LIMIT = 1 << 16
_AT_ONCE = 256


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, or with bytes `start` to `end` of it."""

    file: str
    what: str
    start: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        place = "" if self.start is None else f" bytes {self.start} to {self.end}"
        return f"{self.file}{place}: {self.what}"

    def as_json(self) -> dict[str, Any]:
        """What scripts read."""
        return asdict(self)


def verify(path: Path, advance: Callable[[int], None] = lambda files: None) -> list[Problem]:
    """Check everything about a cache; nothing found means that it is safe and whole.

    All hashes and checksums, names, sizes, shapes, dtypes and codecs; that every number is finite and
    rows of failed images are zero; that ids, texts and statuses can be read and fit together. A block of
    a few megabytes of features is in memory at a time.

    Args:
        path: A cache's folder, or a stored zip of it.
        advance: Called with the number of files that were checked.

    Raises:
        UserError: There is no cache, or one of an unknown format.
    """
    files = open_files(path)
    if files.size("manifest.json") is None:
        raise UserError(f"{path}: there is no manifest.json, so it is no whole feature cache")
    data = files.read("manifest.json", MANIFEST_LIMIT)
    try:
        manifest = parse_manifest(data, "manifest.json")
    except CorruptCacheError as error:
        return [Problem("manifest.json", str(error).removeprefix("manifest.json: "), 0, len(data))]
    if "sha256" not in manifest:
        old = "damaged, or of an earlier version: it has no SHA-256 of its own"
        return [Problem("manifest.json", old, 0, len(data))]
    if render_manifest(manifest) != data:
        return [Problem("manifest.json", "changed after it was written", 0, len(data))]
    problems = list(_listing(files, set(manifest["files"])))
    good = []
    for name, found in files.sizes(manifest["files"]):
        size, digest = manifest["files"][name]
        if found != size:
            problems.append(Problem(name, f"missing, a link or not {size} bytes long"))
        elif name.startswith(f"{PATCHES}/c/"):
            good.append(name)
        else:
            if _sha256(files, name, size) != digest:
                problems.append(Problem(name, "its SHA-256 is not the manifest's", 0, size))
            advance(1)
    status = None
    if not problems:
        try:
            cache = FeatureCache(path)
            problems += _structure(files, cache)
            status = cache.status
        except CorruptCacheError as error:
            problems.append(Problem(*_split(str(error), path)))
    with ThreadPoolExecutor(_cores()) as pool:
        for first in range(0, len(good), _AT_ONCE):
            some = [int(name.split("/")[3]) for name in good[first : first + _AT_ONCE]]
            for wrong in pool.map(lambda shard: list(_shard(files, manifest, shard, status)), some):
                problems += wrong
                advance(1)
    return problems


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_whole(path: Path, what: str) -> None:
    """Verify a cache.

    Raises:
        CorruptCacheError: Naming its first problem.
    """
    problems = verify(path)
    if problems:
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise CorruptCacheError(f"{what}: {problems[0]}{more}; do not use it")


def _split(message: str, path: Path) -> tuple[str, str]:
    place, _, what = message.partition(": ")
    return place.removeprefix(f"{path}/"), what.rpartition("; ")[0] or what


def _listing(files: Files, listed: set[str]) -> Iterator[Problem]:
    """Files that the manifest does not list, links, pipes and other irregular files."""
    if isinstance(files, StoredZip):
        found = {name: True for name in files.members}
    else:
        found = dict(_walk(files.path, ""))
    listed = listed | {"manifest.json", SIGNATURE}
    for name, regular in sorted(found.items()):
        if not regular:
            yield Problem(name, "a link or no regular file")
        elif name not in listed:
            yield Problem(name, "not in the manifest")


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _walk(folder / entry.name, f"{name}/")
            else:
                yield name, stat.S_ISREG(mode)


def _sha256(files: Files, name: str, size: int) -> str:
    return _hashed(files.map(name, size)) if size else hashlib.sha256(b"").hexdigest()


def _hashed(mapped: Mapped) -> str:
    digest = hashlib.sha256()
    for start, end in _blocks(0, len(mapped.data)):
        digest.update(mapped.data[start:end].data)
        mapped.release(start, end)
    return digest.hexdigest()


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, _BLOCK):
        yield at, min(at + _BLOCK, end)


def _shard(
    files: Files, manifest: dict[str, Any], shard: int, status: np.ndarray | None
) -> Iterator[Problem]:
    name = shard_name(shard)
    size, digest = manifest["files"][name]
    mapped = files.map(name, size)
    end = size - CRC_BYTES
    start = end - manifest["shard_images"] * 2 * INDEX_DTYPE.itemsize
    # Mapped twice, so that neither thread gives back what the other is reading.
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(_sha256, files, name, size)
        stored = mapped.data[start:end].copy()
        if crc_bytes(crc(stored)) != mapped.data[end:].tobytes():
            problems = [Problem(name, "its index fails its checksum", start, size)]
        else:
            index = stored.view(INDEX_DTYPE).reshape(-1, 2)
            problems = list(_images(mapped, index, start, manifest, shard, status))
        if hashing.result() != digest and not problems:
            problems.append(Problem(name, "its SHA-256 is not the manifest's", 0, size))
    yield from problems


def _images(
    mapped: Mapped,
    index: np.ndarray,
    limit: int,
    manifest: dict[str, Any],
    shard: int,
    status: np.ndarray | None,
) -> Iterator[Problem]:
    name, size = shard_name(shard), chunk_bytes(manifest)
    first = shard * manifest["shard_images"]
    count = min(manifest["images"] - first, manifest["shard_images"])
    last = 0
    for position in np.argsort(index[:, 0], kind="stable").tolist():
        offset, length = (int(number) for number in index[position])
        row = first + position
        usable = status is None or (position < count and status[row] == 0)
        if offset == length == ABSENT:
            if position < count and usable and status is not None:
                yield Problem(name, f"image {row} is not in it")
            continue
        if position >= count or length != size + CRC_BYTES or offset < last or offset + length > limit:
            yield Problem(name, f"its index puts image {row} at bytes {offset} to {offset + length}")
            return
        last = offset + length
        yield from _image(mapped, offset, size, manifest["dtype"], name, row, usable)


def _image(
    mapped: Mapped, offset: int, size: int, dtype: str, name: str, row: int, usable: bool
) -> Iterator[Problem]:
    checksum, finite, empty = 0, True, True
    width = {"float32": "<u4", "int8": "u1"}.get(dtype, "<u2")
    mask = _NOT_FINITE.get(dtype)
    for start, end in _blocks(offset, offset + size):
        block = mapped.data[start:end].copy()
        mapped.release(start, end)
        checksum = crc(block, checksum)
        numbers = block.view(width)
        if not usable:
            empty = empty and not numbers.any()
        if mask is not None:
            finite = finite and not ((numbers & mask) == mask).any()
    end = offset + size + CRC_BYTES
    if crc_bytes(checksum) != mapped.data[offset + size : end].tobytes():
        yield Problem(name, f"image {row} fails its checksum", offset, end)
    elif not finite:
        yield Problem(name, f"image {row} holds numbers that are infinite or not a number", offset, end)
    elif not usable and not empty:
        yield Problem(name, f"image {row} failed but its row is not zero", offset, end)


def _structure(files: Files, cache: FeatureCache) -> Iterator[Problem]:
    """What the small files say, after their hashes were found right."""
    manifest = cache.manifest
    arrays = [PATCHES, *SMALL_ARRAYS, *(QUANT_ARRAYS if manifest["dtype"] == "int8" else ())]
    known = {"zarr.json", *(f"{name}/zarr.json" for name in arrays)}
    known |= {f"{name.split('/')[0]}/zarr.json" for name in arrays}
    for name in manifest["files"]:
        if name not in known and not name.startswith(tuple(f"{array}/c/" for array in arrays)):
            yield Problem(name, f"a cache of {manifest['dtype']} has no such file")
    for name in sorted(known - set(manifest["files"])):
        if name == "zarr.json" or name.count("/") == 2:
            yield Problem(name, "missing")
    for name in sorted(name for name in known if name.count("/") < 2 and name in manifest["files"]):
        if not _is_group(files.read(name, _METADATA_LIMIT), FORMAT if name == "zarr.json" else {}):
            yield Problem(name, "not a group of a feature cache")
    features = files.read(f"{PATCHES}/zarr.json", _METADATA_LIMIT)
    metadata = array_metadata(features, f"{cache.path}/{PATCHES}/zarr.json")
    require_patches(metadata, manifest, f"{cache.path}/{PATCHES}/zarr.json")
    yield from _quant(cache)
    yield from _rows(cache)
    yield from _texts(cache)


def _is_group(data: bytes, attributes: dict[str, Any]) -> bool:
    try:
        found = json.loads(data)
        plain = found["zarr_format"] == 3 and found["node_type"] == "group"
        return bool(
            plain and found.get("attributes", {}) == attributes and not found.get("consolidated_metadata")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _quant(cache: FeatureCache) -> Iterator[Problem]:
    if cache.quantiser is not None:
        mean, step = cache.quantiser.mean, cache.quantiser.step
        if not (np.isfinite(mean).all() and np.isfinite(step).all() and (step > 0).all()):
            yield Problem("quant", "means or steps are not finite, or a step is not positive")


def _rows(cache: FeatureCache) -> Iterator[Problem]:
    status, ids = cache.status, cache.ids
    cache.array("images/sha256")
    twice = _twice(ids)
    if twice is not None:
        yield Problem("images/id_bytes", f"{twice!r} is the id of several images")
    failed = [(ids[row], STATUS[status[row]]) for row in np.flatnonzero(status)]
    listed = [
        (item.get("id"), item.get("status")) if isinstance(item, dict) else item
        for item in cache.manifest["failures"]
    ]
    reasons = [item.get("reason") if isinstance(item, dict) else None for item in cache.manifest["failures"]]
    if failed != listed or not all(isinstance(reason, str) for reason in reasons):
        yield Problem("manifest.json", "its failures are not those of images/status")


def _twice(ids: Sequence[str]) -> str | None:
    """The first of the strings that is there several times; 8 bytes of each are in memory."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    short = np.fromiter((int.from_bytes(each) for each in digests), np.uint64, len(ids))
    values, numbers = np.unique(short, return_counts=True)
    alike = Counter(ids[int(row)] for row in np.flatnonzero(np.isin(short, values[numbers > 1])))
    return next((name for name, number in alike.items() if number > 1), None)


def _texts(cache: FeatureCache) -> Iterator[Problem]:
    offsets, data, kinds, _ = cache.text_arrays
    # Whether it names images that are there.
    _ = cache.text_image
    for index in range(cache.texts):
        start, end = int(offsets[index]), int(offsets[index + 1])
        try:
            text = Text.decode(data[start:end], KINDS[kinds[index]], "train")
            fits = all(
                turn.role == ("assistant" if len(text.turns) == 1 else ("user", "assistant")[place % 2])
                and isinstance(turn.content, str)
                for place, turn in enumerate(text.turns)
            )
        except CorruptCacheError:
            raise
        except (ValueError, TypeError, RecursionError):
            fits = False
        if not fits:
            yield Problem("texts/bytes", f"text {index} is no {KINDS[kinds[index]]}", start, end)
            return
