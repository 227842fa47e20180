"""The feature cache: one directory a silo, valid zarr v3, committed by its manifest.

    <silo>.zarr/
      manifest.json             written last: what made the cache, every file's size and SHA-256
      features/patch            (images, patches, d_vision); shards of `shard_images`, one image a chunk
      images/{sha256,status,id_offsets,id_bytes}
      texts/{offsets,bytes,image_index,kind,split}

Feature shards are written and read here directly, as `sharding_indexed` files with crc32c, because
one streaming write and one mmap are several times faster than zarr-python on the same bytes. An
unfinished cache lives in `<silo>.zarr.partial` with one record a finished shard in `_done/`, and
is renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pipeline.config import Experiment
from pipeline.errors import UserError, did_you_mean, one_line
from pipeline.manifest import (
    canonical,
    fingerprint,
    locked,
    read_json,
    replace_directory,
    sha256_file,
    sync_directory,
    write_atomic,
    write_json,
)
from pipeline.mirror import pull
from pipeline.records import KINDS, SPLITS, Text
from pipeline.store import Remote

if TYPE_CHECKING:
    import torch

FORMAT: dict[str, Any] = {"name": "fedcmp-features", "version": 1}
STATUS = ("ok", "missing", "unreadable", "not finite")
_STORAGE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
_CRC_BYTES = 4
_INDEX_DTYPE = np.dtype("<u8")
_ABSENT = np.iinfo(np.uint64).max
_RECORD = re.compile(r"[0-9]{5,}\.json")


class CorruptCacheError(UserError):
    """The bytes on disk are not the bytes that were written."""


@dataclass(frozen=True)
class Row:
    """What a cache stores about one image besides its features; `texts` are (kind, split, text)."""

    id: str
    sha256: str
    status: int
    reason: str
    texts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Identity:
    """What a cache is made of: equal identities give equal bytes.

    `key` holds everything that decides a feature's value (encoder, preprocessing, dtype, format);
    `source` identifies the silo's images and texts.
    """

    key: dict[str, Any]
    source: dict[str, Any]

    @property
    def cache_key(self) -> str:
        """SHA-256 of `key`; caches may be trained on together only where it is the same."""
        return fingerprint(self.key)


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Leaves in which two JSON values differ, as `place: ours, theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in sorted(ours.keys() | theirs.keys()):
            place = f"{where}.{name}" if where else name
            found += differences(ours.get(name), theirs.get(name), place)
        return found
    same = canonical(ours) == canonical(theirs)
    return [] if same else [f"{where}: {_short(ours)} here, {_short(theirs)} there"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + "..." + text[-1]


class CacheWriter:
    """Writes a cache shard by shard; a killed writer loses at most its unfinished shard.

    One process at a time, or several that agree on who writes which shard: `open_writer` sees to it.

    Args:
        path: Final directory of the cache.
        identity: What the cache is made of; an unfinished cache of another identity is discarded.
        patches: Tokens an image.
        d_vision: Width of a token.
        dtype: Logical dtype: `bfloat16` (stored as its bits in uint16), `float16` or `float32`.
        shard_images: Images a shard.
        alone: No other process is at work on the cache, so what dead ones left can be removed.

    Raises:
        UserError: Others are at work on a cache of another identity.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        patches: int,
        d_vision: int,
        dtype: str,
        shard_images: int,
        alone: bool = True,
    ) -> None:
        self.path, self.identity, self.shard_images = path, identity, shard_images
        self._shape = (patches, d_vision)
        self._dtype = dtype
        self._partial = partial_path(path)
        self._rows: dict[int, list[Row]] = {}
        self._digests: dict[str, str] = {}
        started = {**asdict(identity), "layout": [patches, d_vision, dtype, shard_images]}
        same = read_json(self._partial / "_done" / "identity.json") == started
        if not alone:
            if not same:
                raise UserError(
                    f"{path}: other processes are making it from other images or with other options; let "
                    "them finish, then run again"
                )
            return
        if not same:
            shutil.rmtree(self._partial, ignore_errors=True)
            write_json(self._partial / "_done" / "identity.json", started)
        self._remove_torn()

    @property
    def rows(self) -> list[Row]:
        """Rows of all shards that were written or found finished, in their order."""
        return [row for shard in sorted(self._rows) for row in self._rows[shard]]

    @property
    def held(self) -> set[int]:
        """Shards that this process wrote or found finished."""
        return set(self._rows)

    def recorded(self) -> set[int] | None:
        """Shards with a record, by whichever process; None once the cache is committed."""
        try:
            # A listing, because network file systems remember for a while that a single file was missing.
            names = os.listdir(self._partial / "_done")
        except FileNotFoundError:
            return None
        return {int(name.removesuffix(".json")) for name in names if _RECORD.fullmatch(name)}

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Keep other processes from a shard; False where one is at it or the cache is committed."""
        try:
            file = (self._partial / "_done" / f"{shard:05d}.lock").open("w")
        except FileNotFoundError:
            yield False
            return
        with file:
            mine = _flock(file, fcntl.LOCK_EX)
            yield mine and (self._partial / "_done" / "identity.json").is_file()

    def finished(self, shard: int) -> list[Row] | None:
        """Rows of a shard that an earlier run finished and whose file is whole, else None."""
        record = read_json(self._record_path(shard))
        file = self._partial / _shard_name(shard)
        if record is None or not file.is_file() or sha256_file(file) != record["sha256"]:
            return None
        rows = [
            Row(row["id"], row["sha256"], row["status"], row["reason"], tuple(map(tuple, row["texts"])))
            for row in record["rows"]
        ]
        self._keep(shard, rows, record["sha256"])
        return rows

    def write(self, shard: int, features: np.ndarray, rows: Sequence[Row]) -> None:
        """Write one shard durably: file, then its record.

        Args:
            shard: Index of the shard.
            features: `(images, patches, d_vision)` in the storage dtype; zero where status is not 0.
            rows: As many rows; every shard but the last has `shard_images` of them.
        """
        storage = _STORAGE[self._dtype]
        if features.shape != (len(rows), *self._shape) or features.dtype != storage:
            raise ValueError(
                f"shard {shard}: expected {storage} {(len(rows), *self._shape)}, "
                f"got {features.dtype} {features.shape}"
            )
        path = self._partial / _shard_name(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".tmp-0")
        index = np.full((self.shard_images, 2), _ABSENT, _INDEX_DTYPE)
        digest, offset = hashlib.sha256(), 0
        with temporary.open("wb") as file:

            def put(data: Any) -> None:
                file.write(data)
                digest.update(data)

            for position, image in enumerate(np.ascontiguousarray(features)):
                data = memoryview(image).cast("B")
                put(data)
                put(_crc(data))
                index[position] = offset, len(data) + _CRC_BYTES
                offset += len(data) + _CRC_BYTES
            put(index.tobytes())
            put(_crc(index.tobytes()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
        record = {"sha256": digest.hexdigest(), "rows": [asdict(row) for row in rows]}
        write_atomic(self._record_path(shard), canonical(record))
        self._keep(shard, list(rows), digest.hexdigest())

    def commit(self, manifest: dict[str, Any]) -> FeatureCache:
        """Write images, texts and the manifest, then give the cache its final name.

        Raises:
            ValueError: A shard was neither written nor found finished.
        """
        if sorted(self._rows) != list(range(len(self._rows))):
            raise ValueError(f"{self.path}: only the shards {sorted(self._rows)} are finished")
        rows = self.rows
        self._remove_torn()
        self._write_arrays(rows)
        files = {}
        for file in sorted(self._partial.rglob("*")):
            name = str(file.relative_to(self._partial))
            if file.is_file() and not name.startswith("_done/"):
                files[name] = [file.stat().st_size, self._digests.get(name) or sha256_file(file)]
        write_json(
            self._partial / "manifest.json",
            {
                "format": FORMAT,
                "images": len(rows),
                "texts": sum(len(row.texts) for row in rows),
                "patches": self._shape[0],
                "d_vision": self._shape[1],
                "shard_images": self.shard_images,
                "dtype": self._dtype,
                "storage_dtype": _STORAGE[self._dtype],
                "cache_key": self.identity.cache_key,
                "key": self.identity.key,
                "source": self.identity.source,
                "failures": [
                    {"id": row.id, "status": STATUS[row.status], "reason": row.reason}
                    for row in rows
                    if row.status
                ],
                **manifest,
                "files": files,
            },
        )
        finish_commit(self.path)
        return FeatureCache(self.path)

    def _remove_torn(self) -> None:
        for torn in self._partial.rglob(".tmp-*"):
            torn.unlink()

    def _keep(self, shard: int, rows: list[Row], digest: str) -> None:
        self._rows[shard] = rows
        self._digests[_shard_name(shard)] = digest

    def _record_path(self, shard: int) -> Path:
        return self._partial / "_done" / f"{shard:05d}.json"

    def _write_arrays(self, rows: Sequence[Row]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        # A commit that was killed left the array's metadata; overwriting it would delete the shards.
        (self._partial / "features/patch/zarr.json").unlink(missing_ok=True)
        group = zarr.open_group(self._partial, mode="a", zarr_format=3, attributes=FORMAT)
        group.create_array(
            "features/patch",
            shape=(len(rows), *self._shape),
            dtype=_STORAGE[self._dtype],
            shards=(self.shard_images, *self._shape),
            chunks=(1, *self._shape),
            compressors=[Crc32cCodec()],
            filters=None,
            attributes={"logical_dtype": self._dtype},
            overwrite=False,
        )
        texts = [(index, text) for index, row in enumerate(rows) for text in row.texts]
        id_offsets, id_bytes = _pack([row.id.encode() for row in rows])
        text_offsets, text_bytes = _pack([content.encode() for _, (_, _, content) in texts])
        digests = b"".join(bytes.fromhex(row.sha256) if row.sha256 else bytes(32) for row in rows)
        arrays = {
            "images/sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
            "images/status": np.array([row.status for row in rows], np.uint8),
            "images/id_offsets": id_offsets,
            "images/id_bytes": id_bytes,
            "texts/offsets": text_offsets,
            "texts/bytes": text_bytes,
            "texts/image_index": np.array([index for index, _ in texts], np.int64),
            "texts/kind": np.array([KINDS.index(kind) for _, (kind, _, _) in texts], np.uint8),
            "texts/split": np.array([SPLITS.index(split) for _, (_, split, _) in texts], np.uint8),
        }
        for name, array in arrays.items():
            group.create_array(name, data=array, compressors=[Crc32cCodec()], filters=None, overwrite=True)


def partial_path(path: Path) -> Path:
    """Where the cache of a silo is built before it is whole."""
    return path.with_name(path.name + ".partial")


def started_key(path: Path) -> dict[str, Any] | None:
    """The key of a silo's finished or unfinished cache, None where there is neither."""
    for place in (path / "manifest.json", partial_path(path) / "_done" / "identity.json"):
        content = read_json(place)
        if content is not None and "key" in content:
            return dict(content["key"])
    return None


def finish_commit(path: Path) -> None:
    """Give a whole partial cache its final name; also completes a commit that was interrupted."""
    partial = partial_path(path)
    if not (partial / "manifest.json").is_file():
        return
    shutil.rmtree(partial / "_done", ignore_errors=True)
    replace_directory(partial, path)


class FeatureCache:
    """Read a committed cache; features come through mmap, checked by crc32c.

    Args:
        path: The cache's directory.

    Raises:
        UserError: There is no manifest, its format is unknown, or a file is missing or has another
            size than the manifest says (which also keeps a truncated mmap from crashing).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_json(path / "manifest.json")
        if self.manifest is None:
            state = "is unfinished" if partial_path(path).exists() else "does not exist"
            raise UserError(f"{path}: this feature cache {state}; run 'fedcmp extract' first")
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"{path}: format {self.manifest.get('format')} is not {FORMAT}; extract it with --overwrite"
            )
        for name, (size, _) in self.manifest["files"].items():
            file = path / name
            if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
                raise CorruptCacheError(f"{file}: missing or not {size} bytes long; extract it again")
        self.images: int = self.manifest["images"]
        self.texts: int = self.manifest["texts"]
        self.patches: int = self.manifest["patches"]
        self.d_vision: int = self.manifest["d_vision"]
        self.cache_key: str = self.manifest["cache_key"]
        self._shard_images: int = self.manifest["shard_images"]
        self._dtype = np.dtype(self.manifest["storage_dtype"])
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def content(self) -> str:
        """SHA-256 of the table of files: equal content, equal training."""
        return fingerprint(self.manifest["files"])

    def _array(self, name: str) -> np.ndarray:
        """A small array, whole; zarr checks its crc32c."""
        import zarr

        try:
            return zarr.open_array(self.path / name, mode="r", zarr_format=3)[:]  # type: ignore[return-value]
        except Exception as error:
            raise CorruptCacheError(
                f"{self.path / name}: {one_line(error)}; extract this silo with --overwrite"
            ) from None

    @cached_property
    def ids(self) -> list[str]:
        """Image ids in row order."""
        offsets, data = self._array("images/id_offsets"), self._array("images/id_bytes").tobytes()
        return [data[start:end].decode() for start, end in pairwise(offsets)]

    @cached_property
    def status(self) -> np.ndarray:
        """`(images,)` uint8: index into `STATUS`; only rows with 0 have features."""
        return self._array("images/status")

    @cached_property
    def text_image(self) -> np.ndarray:
        """`(texts,)` int64: the image row of each text."""
        return self._array("texts/image_index")

    @cached_property
    def _text_arrays(self) -> tuple[np.ndarray, bytes, np.ndarray, np.ndarray]:
        data = self._array("texts/bytes").tobytes()
        return self._array("texts/offsets"), data, self._array("texts/kind"), self._array("texts/split")

    def text(self, index: int) -> Text:
        """One text."""
        offsets, data, kinds, splits = self._text_arrays
        content = data[offsets[index] : offsets[index + 1]]
        return Text.decode(content, KINDS[kinds[index]], SPLITS[splits[index]])

    def usable_texts(self, split: str) -> np.ndarray:
        """Indices of the texts of a split whose image has features, ascending int64."""
        *_, splits = self._text_arrays
        wanted = splits == SPLITS.index(split)
        return np.flatnonzero(wanted & (self.status[self.text_image] == 0))

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Features of images, copied: `(len(rows), patches, d_vision)` in the storage dtype.

        Raises:
            CorruptCacheError: A chunk or shard index fails its crc32c.
        """
        out = np.empty((len(rows), self.patches, self.d_vision), self._dtype)
        size = out[0].nbytes if len(rows) else 0
        for place, row in enumerate(rows):
            shard, position = divmod(int(row), self._shard_images)
            data, index = self._shard(shard)
            offset, length = (int(number) for number in index[position])
            chunk = data[offset : offset + length] if length == size + _CRC_BYTES else data[:0]
            if len(chunk) != size + _CRC_BYTES or _crc(chunk[:size]) != chunk[size:].tobytes():
                raise CorruptCacheError(
                    f"{self.path / _shard_name(shard)}: bytes {offset} to {offset + length} "
                    f"(image '{self.ids[int(row)]}') fail their checksum; extract this silo with --overwrite"
                )
            out[place] = chunk[:size].view(self._dtype).reshape(self.patches, self.d_vision)
        return out

    def tensor(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Features of images as a tensor `(len(rows), patches, d_vision)` in the logical dtype."""
        import torch

        features = torch.from_numpy(self.read(rows))
        return features.view(torch.bfloat16) if self.manifest["dtype"] == "bfloat16" else features

    def _shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._shards:
            path = self.path / _shard_name(shard)
            data = np.memmap(path, np.uint8, "r")
            end = data.size - _CRC_BYTES
            start = end - self._shard_images * 2 * _INDEX_DTYPE.itemsize
            if start < 0 or _crc(data[start:end]) != data[end:].tobytes():
                raise CorruptCacheError(
                    f"{path}: its index fails its checksum; extract this silo with --overwrite"
                )
            self._shards[shard] = data, data[start:end].view(_INDEX_DTYPE).reshape(-1, 2)
        return self._shards[shard]


def open_cache(experiment: Experiment, silo: str) -> FeatureCache:
    """The cache of a silo of an experiment, or one that a partner site put beside them.

    Raises:
        UserError: There is none, with the nearest name where the silo is not configured either.
    """
    path = experiment.cache_path(silo)
    if experiment.store is not None:
        pull(Remote(experiment.store) / path.name, path)
    if silo not in experiment.extract.silos and not path.exists():
        hint = did_you_mean(silo, experiment.extract.silos)
        raise UserError(f"no silo '{silo}' in extract.silos, and no cache {path}{hint}")
    return FeatureCache(path)


def same_key(caches: dict[str, FeatureCache]) -> None:
    """Require that caches were made by one encoder in one way.

    Raises:
        UserError: Naming two silos and the fields in which they differ.
    """
    (first, reference), *others = caches.items()
    for name, cache in others:
        found = differences(reference.manifest["key"], cache.manifest["key"])
        if found:
            raise UserError(
                f"silos '{first}' and '{name}' were encoded differently ({'; '.join(found)}); "
                f"extract one of them again"
            )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same cache.

    Raises:
        UserError: Another process is at it.
    """
    with ExitStack() as held:
        with settling(path):
            held.enter_context(locked(_lock_path(path), str(path)))
        yield


def settling(path: Path) -> AbstractContextManager[None]:
    """Wait for one's turn to start on a cache or to commit it; held for moments only, never nested."""
    return locked(path.with_name(f".{path.name}.commit.lock"), str(path), wait=True)


@contextmanager
def open_writer(
    path: Path, identity: Identity, *, together: bool, **layout: Any
) -> Iterator[CacheWriter | None]:
    """A writer for one process, or one of several that write together; None if there is nothing to do.

    Processes that write together hold the cache's lock as readers do, so that no lone process comes
    between them. Whoever is the only one at the start clears up after those that were killed.

    Args:
        path: Final directory of the cache.
        identity: What the cache is made of.
        together: Let other processes write other shards of it at the same time.
        **layout: `patches`, `d_vision`, `dtype` and `shard_images` of `CacheWriter`.

    Yields:
        The writer; None where the others committed the very cache in the meantime.

    Raises:
        UserError: A process is at work that shares with nobody, or others make another cache.
    """
    if not together:
        with writing(path):
            yield CacheWriter(path, identity, **layout)
        return
    with ExitStack() as held:
        with settling(path):
            lock = held.enter_context(_lock_path(path).open("w"))
            alone = _flock(lock, fcntl.LOCK_EX)
            if not alone and not _flock(lock, fcntl.LOCK_SH):
                raise UserError(f"{path}: another process is at work on it alone; let it finish")
            finish_commit(path)
            made = read_json(path / "manifest.json") or {}
            if (made.get("key"), made.get("source")) == (identity.key, identity.source):
                writer = None
            else:
                writer = CacheWriter(path, identity, alone=alone, **layout)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield writer


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _flock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def to_storage(features: torch.Tensor, dtype: str) -> np.ndarray:
    """Features as they are stored: bfloat16 becomes its bits in uint16."""
    import torch

    cast = features.to(getattr(torch, dtype)).cpu().contiguous()
    return (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()


def _shard_name(shard: int) -> str:
    return f"features/patch/c/{shard}/0/0"


def _crc(data: Any) -> bytes:
    return google_crc32c.value(bytes(data)).to_bytes(_CRC_BYTES, "little")


def _pack(items: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(items) + 1, np.int64)
    offsets[1:] = np.cumsum([len(item) for item in items])
    return offsets, np.frombuffer(b"".join(items), np.uint8)
