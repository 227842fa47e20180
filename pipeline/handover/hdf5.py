"""A cache as HDF5: features and texts as plain contiguous datasets, and all that is needed to get back.

    features/patch, images/…, texts/…   for any reader of HDF5
    manifest, files/…                   the cache's small files as they are, for `fedcmp cache unpack`

Unpacking reads `manifest`, `files` and `features/patch` only, and refuses whatever could make the
library read elsewhere: links, external storage, virtual datasets, filters. What is left lies in one piece, so
all that libhdf5 is asked for is where: in a process of its own, as damage can send it into a crash or an
endless loop. The bytes are then read as those of any file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedcmp.pipeline.apart import apart
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.cache.format import (
    CRC_BYTES,
    MANIFEST_LIMIT,
    PATCHES,
    SMALL_ARRAYS,
    chunk_bytes,
    parse_manifest,
)
from fedcmp.pipeline.cache.stream import stream_shard
from fedcmp.pipeline.console import Task
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.handover.signature import SIGNATURE_LIMIT

if TYPE_CHECKING:
    from fedcmp.pipeline.handover.archive import Content

_IMAGES_AT_ONCE = 16


def export(out: Path, cache: FeatureCache, content: Content, task: Task) -> None:
    """Write HDF5; features are checked by their crc32c as they are read, small files by their hashes.

    Raises:
        UserError: The cache is damaged, or its shards are not in plain order.
    """
    import h5py

    shape = (cache.images, cache.patches, cache.d_vision)
    with h5py.File(out, "w", locking=False) as file:
        file.create_dataset("manifest", data=np.frombuffer(content.manifest, np.uint8))
        if content.signature is not None:
            file.create_dataset("signature", data=np.frombuffer(content.signature, np.uint8))
        features = file.create_dataset(PATCHES, shape, cache.dtype, track_times=False)
        features.attrs["logical_dtype"] = cache.manifest["dtype"]
        step = cache.manifest["shard_images"]
        for start in range(0, cache.images, step):
            _require_plain_shard(cache, start // step)
            for first in range(start, min(start + step, cache.images), _IMAGES_AT_ONCE):
                rows = range(first, min(first + _IMAGES_AT_ONCE, start + step, cache.images))
                features[rows.start : rows.stop] = cache.read(rows)
            task.advance()
        for name, (path, size, digest) in content.files.items():
            if not name.startswith(f"{PATCHES}/c/"):
                data = path.read_bytes()
                if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                    raise UserError(f"{path}: not what the manifest says; see 'fedcmp cache verify'")
                file.create_dataset(f"files/{name}", data=np.frombuffer(data, np.uint8), track_times=False)
                task.advance()
        with_texts = "texts_left_out" not in parse_manifest(content.manifest, str(cache.path))
        for name in SMALL_ARRAYS:
            if with_texts or not name.startswith("texts/"):
                file.create_dataset(name, data=cache.array(name), track_times=False)


def _require_plain_shard(cache: FeatureCache, shard: int) -> None:
    step = cache.manifest["shard_images"]
    count, length = min(cache.images - shard * step, step), chunk_bytes(cache.manifest) + CRC_BYTES
    if cache.places(shard)[:count] != [[place * length, length] for place in range(count)]:
        raise UserError(f"{cache.path}: another program wrote its shards in another order; pack it as a zip")


class _Part(NamedTuple):
    """Where a dataset lies in the file."""

    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: str


def open_archive(path: Path) -> tuple[bytes, bytes | None, Callable[[str, Path, int, str], None]]:
    """Manifest, signature and files of a cache in HDF5.

    Raises:
        UserError: It is damaged, or takes data from elsewhere.
    """
    (parts,) = apart(path, _parts, path)
    data = _read(path, parts["manifest"])
    manifest = parse_manifest(data, f"{path}: manifest")
    signature = _read(path, parts["signature"]) if "signature" in parts else None

    def restore(name: str, target: Path, size: int, digest: str) -> None:
        if name.startswith(f"{PATCHES}/c/"):
            first = int(name.split("/")[3]) * manifest["shard_images"]
            images = _images(path, parts[PATCHES], first, manifest["shard_images"])
            found = stream_shard(target, images, manifest["shard_images"])
        else:
            content = _read(path, parts[f"files/{name}"])
            write_atomic(target, content)
            found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise UserError(f"{path}: '{name}' is not what its manifest says; have it sent again")

    return data, signature, restore


def _read(path: Path, part: _Part) -> bytes:
    with path.open("rb") as file:
        file.seek(part.offset)
        data = file.read(part.size)
    if len(data) != part.size:
        raise UserError(f"{path}: it is truncated; have it sent again")
    return data


def _images(path: Path, part: _Part, first: int, number: int) -> Iterator[np.ndarray]:
    """Features of images, `(patches, d_vision)` each."""
    images, *shape = part.shape
    end, size = min(first + number, images), prod(shape) * np.dtype(part.dtype).itemsize
    for start in range(first, end, _IMAGES_AT_ONCE):
        some = min(_IMAGES_AT_ONCE, end - start)
        data = _read(path, part._replace(offset=part.offset + start * size, size=some * size))
        yield from np.frombuffer(data, part.dtype).reshape(some, *shape)


def _parts(path: Path) -> Iterator[dict[str, _Part]]:
    """Where everything lies that a cache is made of, by name."""
    import h5py

    with _whole(path), h5py.File(path, "r", locking=False) as file:
        found = {"manifest": _bytes(_dataset(file, "manifest", path), MANIFEST_LIMIT, path)}
        manifest = parse_manifest(_read(path, found["manifest"]), f"{path}: manifest")
        if "signature" in file:
            found["signature"] = _bytes(_dataset(file, "signature", path), SIGNATURE_LIMIT, path)
        features = _dataset(file, PATCHES, path)
        shape = (manifest["images"], manifest["patches"], manifest["d_vision"])
        if features.shape != shape or features.dtype != manifest["storage_dtype"]:
            raise UserError(
                f"{path}: its features are {features.dtype} {features.shape}, where its manifest says "
                f"{manifest['storage_dtype']} {shape}; do not use it"
            )
        found[PATCHES] = _part(features, path)
        for name, (size, _) in manifest["files"].items():
            if not name.startswith(f"{PATCHES}/c/"):
                found[f"files/{name}"] = _bytes(_dataset(file, f"files/{name}", path), size, path)
        yield found


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Damage in one line, whatever h5py makes of it; a disk that fails is none."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: not a whole HDF5 file ({one_line(error)}); have it sent again") from None


def _dataset(file: Any, name: str, path: Path) -> Any:
    """A dataset whose numbers lie in this very file, one after the other."""
    import h5py

    found = file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            raise UserError(f"{path}: there is no '{name}' in it, so it is no feature cache")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{path}: '{part}' in '{name}' is a link; do not use it")
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path}: '{name}' holds no numbers; do not use it")
    plan = found.id.get_create_plist()
    if found.is_virtual or plan.get_external_count():
        raise UserError(f"{path}: '{name}' takes its data from other files; do not use it")
    contiguous = plan.get_layout() == h5py.h5d.CONTIGUOUS and not plan.get_nfilters()
    if not contiguous or found.dtype.kind not in "uif" or found.id.get_storage_size() != found.nbytes:
        raise UserError(f"{path}: '{name}' is not contiguous and whole; do not use it")
    return found


def _bytes(dataset: Any, limit: int, path: Path) -> _Part:
    if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > limit:
        raise UserError(f"{path}: '{dataset.name}' is not a list of at most {limit} bytes; do not use it")
    return _part(dataset, path)


def _part(dataset: Any, path: Path) -> _Part:
    offset, size = dataset.id.get_offset() or 0, dataset.nbytes
    if offset + size > path.stat().st_size:
        raise UserError(f"{path}: '{dataset.name}' ends beyond the file; have it sent again")
    return _Part(offset, size, dataset.shape, dataset.dtype.str)
