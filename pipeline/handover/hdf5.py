"""A cache as HDF5: features and texts as plain contiguous datasets, and all that is needed to get back.

    features/patch, images/…, texts/…   for any reader of HDF5
    manifest, files/…                   the cache's small files as they are, for `fedcmp cache unpack`

Unpacking reads `manifest`, `files` and `features/patch` only, and refuses whatever could make the
library read elsewhere: links, external storage, virtual datasets, filters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cache import FeatureCache
from pipeline.cache.format import (
    CRC_BYTES,
    MANIFEST_LIMIT,
    PATCHES,
    SMALL_ARRAYS,
    checked_manifest,
    chunk_bytes,
)
from pipeline.cache.stream import stream_shard
from pipeline.console import Task
from pipeline.errors import UserError, one_line
from pipeline.handover.signature import SIGNATURE_LIMIT
from pipeline.manifest import write_atomic

if TYPE_CHECKING:
    from pipeline.handover.pack import Content

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
        with_texts = "texts_left_out" not in checked_manifest(content.manifest, str(cache.path))
        for name in SMALL_ARRAYS:
            if with_texts or not name.startswith("texts/"):
                file.create_dataset(name, data=cache.array(name), track_times=False)


def _require_plain_shard(cache: FeatureCache, shard: int) -> None:
    step = cache.manifest["shard_images"]
    count, length = min(cache.images - shard * step, step), chunk_bytes(cache.manifest) + CRC_BYTES
    if cache.places(shard)[:count] != [[place * length, length] for place in range(count)]:
        raise UserError(f"{cache.path}: another program wrote its shards in another order; pack it as a zip")


def opened(path: Path) -> tuple[bytes, bytes | None, Callable[[str, Path, int, str], None]]:
    """Manifest, signature and files of a cache in HDF5.

    Raises:
        UserError: It is damaged, or takes data from elsewhere.
    """
    import h5py

    with _whole(path):
        file = h5py.File(path, "r", locking=False)
        return _parts(file, path)


def _parts(file: Any, path: Path) -> tuple[bytes, bytes | None, Callable[[str, Path, int, str], None]]:
    data = _bytes(_dataset(file, "manifest", path), MANIFEST_LIMIT, path)
    manifest = checked_manifest(data, f"{path}: manifest")
    signature = (
        _bytes(_dataset(file, "signature", path), SIGNATURE_LIMIT, path) if "signature" in file else None
    )
    features = _dataset(file, PATCHES, path)
    shape = (manifest["images"], manifest["patches"], manifest["d_vision"])
    if features.shape != shape or features.dtype != manifest["storage_dtype"]:
        raise UserError(
            f"{path}: its features are {features.dtype} {features.shape}, where its manifest says "
            f"{manifest['storage_dtype']} {shape}; do not use it"
        )

    def images(shard: int) -> Iterator[np.ndarray]:
        start = shard * manifest["shard_images"]
        end = min(start + manifest["shard_images"], manifest["images"])
        for first in range(start, end, _IMAGES_AT_ONCE):
            yield from features[first : min(first + _IMAGES_AT_ONCE, end)]

    def restore(name: str, target: Path, size: int, digest: str) -> None:
        if name.startswith(f"{PATCHES}/c/"):
            shard = int(name.split("/")[3])
            with _whole(path):
                found = stream_shard(target, images(shard), manifest["shard_images"])
        else:
            with _whole(path):
                content = _bytes(_dataset(file, f"files/{name}", path), size, path)
            write_atomic(target, content)
            found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise UserError(f"{path}: '{name}' is not what its manifest says; have it sent again")

    return data, signature, restore


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Damage in one line, whatever h5py makes of it; a disk that is full is none."""
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


def _bytes(dataset: Any, limit: int, path: Path) -> bytes:
    if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > limit:
        raise UserError(f"{path}: '{dataset.name}' is no list of at most {limit} bytes; do not use it")
    return bytes(dataset[:].tobytes())
