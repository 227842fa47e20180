"""Writing a cache: shards are streamed, the manifest comes last, nothing half-written is taken for whole."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.cache.format import (
    FORMAT,
    STORAGE,
    Identity,
    Row,
    render_manifest,
    seal_manifest,
    shard_name,
)
from fedcmp.pipeline.cache.int8 import Quantiser
from fedcmp.pipeline.cache.locks import finish_commit, lock_path, partial_path, settling, try_lock, writing
from fedcmp.pipeline.cache.mark import remember_written
from fedcmp.pipeline.cache.reader import FeatureCache
from fedcmp.pipeline.cache.stream import stream_shard
from fedcmp.pipeline.cache.tables import Table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, sync_directory, write_atomic, write_json
from fedcmp.pipeline.hashes import canonical, sha256_file

_RECORD = re.compile(r"[0-9]{5,}\.json")


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
        self._shards: set[int] = set()
        self._digests: dict[str, str] = {}
        self._measured: dict[int, Sequence[float]] = {}
        self._quantiser: Quantiser | None = None
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
    def rows(self) -> Iterator[Row]:
        """Rows of all shards that were written or found finished, in their order, read from their records."""
        return (row for shard in sorted(self._shards) for row in self._recorded(shard))

    @property
    def held(self) -> set[int]:
        """Shards that this process wrote or found finished."""
        return set(self._shards)

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
            mine = try_lock(file, fcntl.LOCK_EX)
            yield mine and (self._partial / "_done" / "identity.json").is_file()

    def finished(self, shard: int) -> list[Row] | None:
        """Rows of a shard that an earlier run or another process finished and whose file is whole, else None.

        A file that was not touched since its writer recorded its hash is not read again.
        """
        record = read_json(self._record_path(shard))
        file = self._partial / shard_name(shard)
        if record is None or not file.is_file():
            return None
        if record.get("stamp") != _stamp(file) and sha256_file(file) != record["sha256"]:
            return None
        self._keep(shard, record["sha256"], record.get("measured"))
        return _rows(record)

    def _recorded(self, shard: int) -> list[Row]:
        return _rows(read_json(self._record_path(shard)))

    def calibrate(self, fit: Callable[[], Quantiser]) -> Quantiser:
        """How int8 features are stored: as whoever comes first among the cache's processes measures it."""
        path = self._partial / "_done" / "quantiser.npy"
        if not path.exists():
            mine = fit()
            temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}.npy")
            with temporary.open("wb") as file:
                np.save(file, np.stack([mine.mean, mine.step]))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
        self._quantiser = Quantiser(*np.load(path, allow_pickle=False))
        return self._quantiser

    def write(
        self, shard: int, features: np.ndarray, rows: Sequence[Row], measured: Sequence[float] | None = None
    ) -> None:
        """Write one shard durably: file, then its record.

        Args:
            shard: Index of the shard.
            features: `(images, patches, d_vision)` in the storage dtype; zero where status is not 0.
            rows: As many rows; every shard but the last has `shard_images` of them.
            measured: What `Quantiser.error` says of int8 features.
        """
        storage = STORAGE[self._dtype]
        if features.shape != (len(rows), *self._shape) or features.dtype != storage:
            raise ValueError(
                f"shard {shard}: expected {storage} {(len(rows), *self._shape)}, "
                f"got {features.dtype} {features.shape}"
            )
        path = self._partial / shard_name(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".tmp-0")
        digest = stream_shard(temporary, features, self.shard_images)
        temporary.replace(path)
        sync_directory(path.parent)
        record: dict[str, Any] = {
            "sha256": digest,
            "stamp": _stamp(path),
            "rows": [asdict(row) for row in rows],
        }
        if measured is not None:
            record["measured"] = measured
        write_atomic(self._record_path(shard), canonical(record))
        self._keep(shard, digest, measured)

    def commit(self, manifest: dict[str, Any]) -> FeatureCache:
        """Write images, texts and the manifest, then give the cache its final name.

        Raises:
            ValueError: A shard was neither written nor found finished.
        """
        if sorted(self._shards) != list(range(len(self._shards))):
            raise ValueError(f"{self.path}: only the shards {sorted(self._shards)} are finished")
        table = Table(self.rows)
        self._keep_only_shards()
        self._write_arrays(table)
        body = {
            "format": FORMAT,
            "images": table.images,
            "texts": table.texts,
            "patches": self._shape[0],
            "d_vision": self._shape[1],
            "shard_images": self.shard_images,
            "dtype": self._dtype,
            "storage_dtype": STORAGE[self._dtype],
            "cache_key": self.identity.cache_key,
            "key": self.identity.key,
            "source": self.identity.source,
            "failures": table.failures,
            **({"notes": dict(sorted(table.notes.items()))} if table.notes else {}),
            **self._loss(),
            **manifest,
            "files": file_table(self._partial, self._digests),
        }
        write_atomic(self._partial / "manifest.json", render_manifest(seal_manifest(body)))
        finish_commit(self.path)
        remember_written(self.path)
        return FeatureCache(self.path)

    def _loss(self) -> dict[str, Any]:
        """What int8 costs, measured on every image that this or an earlier run wrote."""
        if not self._measured:
            return {}
        wrong, size, ends, number = map(sum, zip(*self._measured.values(), strict=True))
        return {
            "int8": {
                "relative_error": float(f"{(wrong / max(size, 1e-300)) ** 0.5:.4g}"),
                "at_range_end": float(f"{ends / number:.4g}"),
            }
        }

    def _remove_torn(self) -> None:
        for torn in self._partial.rglob(".tmp-*"):
            torn.unlink()

    def _keep_only_shards(self) -> None:
        """Remove what a commit that was killed left: torn files of ours and of zarr's."""
        for file in self._partial.rglob("*"):
            name = str(file.relative_to(self._partial))
            if file.is_file() and not name.startswith("_done/") and name not in self._digests:
                file.unlink()

    def _keep(self, shard: int, digest: str, measured: Sequence[float] | None) -> None:
        self._shards.add(shard)
        if measured is not None:
            self._measured[shard] = measured
        self._digests[shard_name(shard)] = digest

    def _record_path(self, shard: int) -> Path:
        return self._partial / "_done" / f"{shard:05d}.json"

    def _write_arrays(self, table: Table) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.open_group(self._partial, mode="a", zarr_format=3, attributes=FORMAT)
        group.create_array(
            "features/patch",
            shape=(table.images, *self._shape),
            dtype=STORAGE[self._dtype],
            shards=(self.shard_images, *self._shape),
            chunks=(1, *self._shape),
            compressors=[Crc32cCodec()],
            filters=None,
            attributes={"logical_dtype": self._dtype},
            overwrite=False,
        )
        arrays = table.arrays()
        if self._quantiser is not None:
            arrays["quant/channel_mean"] = self._quantiser.mean
            arrays["quant/channel_step"] = self._quantiser.step
        put_arrays(self._partial, arrays)


def _stamp(file: Path) -> list[int]:
    """What changes with a file's bytes and cannot be set back: size, and times of content and inode."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _rows(record: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            row["id"],
            row["sha256"],
            row["status"],
            row["reason"],
            tuple(map(tuple, row["texts"])),
            tuple(row.get("notes", ())),
        )
        for row in record["rows"]
    ]


def put_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write small arrays into a cache's folder."""
    import zarr
    from zarr.codecs import Crc32cCodec

    group = zarr.open_group(folder, mode="a", zarr_format=3, attributes=FORMAT)
    for name, array in arrays.items():
        group.create_array(name, data=array, compressors=[Crc32cCodec()], filters=None, overwrite=True)


def file_table(folder: Path, known: Mapping[str, str]) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file of an unfinished cache; hashes that are known are taken over."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and name != "manifest.json" and not name.startswith("_done/"):
            files[name] = [file.stat().st_size, known.get(name) or sha256_file(file)]
    return files


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
        UserError: Another process writes it alone, or others make a different cache.
    """
    if not together:
        with writing(path):
            yield CacheWriter(path, identity, **layout)
        return
    with ExitStack() as held:
        with settling(path):
            lock = held.enter_context(lock_path(path).open("w"))
            alone = try_lock(lock, fcntl.LOCK_EX)
            if not alone and not try_lock(lock, fcntl.LOCK_SH):
                raise UserError(f"{path}: another process is at work on it alone; let it finish")
            finish_commit(path)
            made = read_json(path / "manifest.json") or {}
            if (made.get("key"), made.get("source")) == (identity.key, identity.source):
                writer = None
            else:
                writer = CacheWriter(path, identity, alone=alone, **layout)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield writer
