"""What the bytes of a feature cache mean: names, dtypes, checksums, and the manifest's own rules."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import canonical, fingerprint

if TYPE_CHECKING:
    import torch

FORMAT: dict[str, Any] = {"name": "fedcmp-features", "version": 1}
STATUS = ("ok", "missing", "unreadable", "not finite")
STORAGE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32", "int8": "int8"}
CRC_BYTES = 4
INDEX_DTYPE = np.dtype("<u8")
ABSENT = np.iinfo(np.uint64).max
MANIFEST_LIMIT = 1 << 26
_SHARD_LIMIT = 1 << 20

PATCHES = "features/patch"
SMALL_ARRAYS = {
    "images/sha256": "uint8",
    "images/status": "uint8",
    "images/id_offsets": "int64",
    "images/id_bytes": "uint8",
    "texts/offsets": "int64",
    "texts/bytes": "uint8",
    "texts/image_index": "int64",
    "texts/kind": "uint8",
    "texts/split": "uint8",
}
QUANT_ARRAYS = {"quant/channel_mean": "float32", "quant/channel_step": "float32"}
_ARRAYS = "|".join([PATCHES, *SMALL_ARRAYS, *QUANT_ARRAYS])
_NAME = re.compile(
    rf"zarr\.json|(features|images|texts|quant)/zarr\.json|({_ARRAYS})/(zarr\.json|c(/(0|[1-9][0-9]{{0,9}})){{1,3}})"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CorruptCacheError(UserError):
    """The bytes on disk are not the bytes that were written."""


@dataclass(frozen=True)
class Row:
    """What is known about one image besides its features.

    Attributes:
        id: Its name.
        sha256: Of its file, empty where that could not be read.
        status: Index into `STATUS`.
        reason: Why there are no features, where there are none.
        texts: (kind, split, text) of each.
        notes: What may not be as a person sees it; counted in the manifest.
    """

    id: str
    sha256: str
    status: int
    reason: str
    texts: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()


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


def shard_name(shard: int) -> str:
    """File of a shard of features, relative to the cache."""
    return f"{PATCHES}/c/{shard}/0/0"


def images_in(megabytes: float, patches: int, d_vision: int, dtype: str) -> int:
    """Images whose features, of a logical dtype, make a shard of about so many MB; at least one."""
    image = patches * d_vision * np.dtype(STORAGE[dtype]).itemsize + CRC_BYTES + 2 * INDEX_DTYPE.itemsize
    return min(max(int(megabytes * 1e6 / image), 1), _SHARD_LIMIT)


def crc(data: Any, before: int = 0) -> int:
    """crc32c of a bytes-like object (arrays are not copied), continuing that of what came before it."""
    if isinstance(data, memoryview | bytearray):
        data = np.frombuffer(data, np.uint8)
    return google_crc32c.extend(before, data)


def crc_bytes(number: int) -> bytes:
    """A crc32c as it is stored."""
    return number.to_bytes(CRC_BYTES, "little")


def to_storage(features: torch.Tensor, dtype: str) -> np.ndarray:
    """Floating-point features as they are stored: bfloat16 becomes its bits in uint16."""
    import torch

    cast = features.to(getattr(torch, dtype)).cpu().contiguous()
    return (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()


def seal_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own SHA-256, which finds a flipped byte in the manifest itself."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**body, "sha256": fingerprint(body)}


def render_manifest(manifest: dict[str, Any]) -> bytes:
    """The bytes of `manifest.json`."""
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_manifest(data: bytes, place: str) -> dict[str, Any]:
    """Read a manifest that anybody may have written.

    Args:
        data: Bytes of `manifest.json`.
        place: Where they come from, for errors.

    Raises:
        UserError: It is of another format.
        CorruptCacheError: It was damaged, or says what cannot be: what follows from its numbers
            never takes more memory than its files have bytes.
    """
    try:
        manifest = json.loads(data)
        if not isinstance(manifest, dict):
            raise TypeError("no table")
        stated, body = manifest.get("sha256"), dict(manifest)
        body.pop("sha256", None)
        actual = fingerprint(body)
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCacheError(
            f"{place}: not a manifest ({error}); have it sent or extract it again"
        ) from None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{place}: format {_short(manifest.get('format'))} is not {FORMAT}; extract it with --overwrite"
        )
    if stated is not None and stated != actual:
        raise CorruptCacheError(
            f"{place}: it was changed after it was written (its own SHA-256 differs); have it sent "
            "or extract it again"
        )
    problem = _problem(manifest)
    if problem:
        raise CorruptCacheError(f"{place}: {problem}; do not use this cache")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    for name in ("images", "texts", "patches", "d_vision", "shard_images"):
        if type(manifest.get(name)) is not int or manifest[name] < (name not in ("images", "texts")):
            return f"{name} = {_short(manifest.get(name))} is no count"
    if manifest["shard_images"] > _SHARD_LIMIT:
        return f"shard_images = {manifest['shard_images']} is more than {_SHARD_LIMIT}"
    dtype = manifest.get("dtype")
    if not isinstance(dtype, str) or STORAGE.get(dtype, "") != manifest.get("storage_dtype"):
        return f"dtype {_short(dtype)} is not stored as {_short(manifest.get('storage_dtype'))}"
    key, files = manifest.get("key"), manifest.get("files")
    if not isinstance(key, dict) or fingerprint(key) != manifest.get("cache_key"):
        return "cache_key is not the SHA-256 of key"
    if not isinstance(manifest.get("source"), dict) or not isinstance(manifest.get("failures"), list):
        return "it has no source or no list of failures"
    if not isinstance(files, dict):
        return "it has no table of files"
    for name, entry in files.items():
        if not _NAME.fullmatch(name):
            return f"it lists {name!r}, which no cache has"
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and type(entry[0]) is int
            and entry[0] >= 0
            and isinstance(entry[1], str)
            and _SHA256.fullmatch(entry[1])
        ):
            return f"size and SHA-256 of {name!r} are {_short(entry)}"
    folders: set[str] = set()
    for name in files:
        # Not by pathlib, which took most of the time of opening a cache of many files.
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    if both := sorted(folders & files.keys()):
        return f"it lists {both[0]!r} as a file and as a folder"
    return _out_of_proportion(manifest)


def _out_of_proportion(manifest: dict[str, Any]) -> str | None:
    """Numbers that its files are too small for."""
    sizes = {name: size for name, (size, _) in manifest["files"].items()}
    images, shard_images = manifest["images"], manifest["shard_images"]
    shards = -(-images // shard_images)
    held = sorted(name for name in sizes if name.startswith(f"{PATCHES}/c/"))
    if len(held) != shards or not all(shard_name(shard) in sizes for shard in range(shards)):
        return f"{images} images in shards of {shard_images} are {shards} files, but it lists {len(held)}"
    index = shard_images * 2 * INDEX_DTYPE.itemsize + CRC_BYTES
    chunk = chunk_bytes(manifest)
    largest = max((sizes[name] for name in held), default=0)
    if any(sizes[name] < index for name in held) or (images and largest < chunk + CRC_BYTES + index):
        return f"its shards are too small for images of {chunk} bytes"
    texts = sum(size for name, size in sizes.items() if name.startswith("texts/") and "/c/" in name)
    if manifest["texts"] > texts:
        return f"{manifest['texts']} texts do not fit into files of {texts} bytes"
    return None


def chunk_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of one image's features."""
    return int(manifest["patches"] * manifest["d_vision"] * np.dtype(manifest["storage_dtype"]).itemsize)


_BYTES_CODEC: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC_CODEC = {"name": "crc32c"}


def array_metadata(data: bytes, place: str) -> dict[str, Any]:
    """Read a `zarr.json` of an array, which anybody may have written.

    Raises:
        CorruptCacheError: It is laid out, filled or encoded in a way in which we never write.
    """
    try:
        found = json.loads(data)
        separator = found["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        plain = (
            found["zarr_format"] == 3
            and found["node_type"] == "array"
            and found["chunk_grid"]["name"] == "regular"
            and found["chunk_key_encoding"]["name"] == "default"
            and separator == "/"
            and found["fill_value"] == 0
            and not found.get("storage_transformers")
        )
        shape, chunk = found["shape"], found["chunk_grid"]["configuration"]["chunk_shape"]
        plain &= len(shape) == len(chunk)
        plain &= all(type(n) is int and n >= 0 for n in shape) and all(
            type(n) is int and n > 0 for n in chunk
        )
        codecs = [{"name": codec["name"], **_configured(codec)} for codec in found["codecs"]]
        dtype, attributes = found["data_type"], found.get("attributes", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{place}: not a zarr array ({error}); do not use this cache") from None
    if not plain:
        raise CorruptCacheError(
            f"{place}: not laid out as a feature cache's arrays are; do not use this cache"
        )
    return {
        "shape": shape,
        "chunk": chunk,
        "dtype": dtype,
        "codecs": codecs,
        "attributes": attributes,
    }


def _configured(codec: dict[str, Any]) -> dict[str, Any]:
    return {"configuration": codec["configuration"]} if codec.get("configuration") else {}


def require_plain(metadata: dict[str, Any], dtype: str, place: str) -> None:
    """Require bytes and crc32c as the only codecs, and a dtype.

    Raises:
        CorruptCacheError: It is encoded otherwise, for example compressed.
    """
    one_byte = np.dtype(dtype).itemsize == 1
    codecs = [codec for codec in metadata["codecs"]]
    expected = [[_BYTES_CODEC, _CRC_CODEC]] + ([[{"name": "bytes"}, _CRC_CODEC]] if one_byte else [])
    if codecs not in expected:
        names = ", ".join(str(codec["name"]) for codec in codecs)
        raise CorruptCacheError(f"{place}: codecs {names} instead of bytes, crc32c; do not use this cache")
    if metadata["dtype"] != dtype:
        raise CorruptCacheError(
            f"{place}: holds {metadata['dtype']} instead of {dtype}; do not use this cache"
        )


def require_patches(metadata: dict[str, Any], manifest: dict[str, Any], place: str) -> None:
    """Require that the metadata of the features say what the manifest says.

    Raises:
        CorruptCacheError: Shape, shards, dtype or codecs differ.
    """
    row = [manifest["patches"], manifest["d_vision"]]
    wanted = [manifest["images"], *row], [manifest["shard_images"], *row]
    if (metadata["shape"], metadata["chunk"]) != wanted:
        raise CorruptCacheError(
            f"{place}: shape {metadata['shape']} in shards of {metadata['chunk']}, where the manifest says "
            f"{wanted[0]} in {wanted[1]}; do not use this cache"
        )
    codecs = metadata["codecs"]
    inner = codecs[0].get("configuration", {}) if codecs and isinstance(codecs[0], dict) else {}
    sharded = (
        len(codecs) == 1
        and codecs[0]["name"] == "sharding_indexed"
        and inner.get("chunk_shape") == [1, *row]
        and inner.get("index_location", "end") == "end"
        and inner.get("index_codecs") == [_BYTES_CODEC, _CRC_CODEC]
    )
    if not sharded:
        raise CorruptCacheError(f"{place}: not sharded with one image a chunk; do not use this cache")
    storage = manifest["storage_dtype"]
    require_plain({"codecs": inner.get("codecs"), "dtype": metadata["dtype"]}, storage, place)
    if metadata["attributes"] != {"logical_dtype": manifest["dtype"]}:
        raise CorruptCacheError(
            f"{place}: its logical dtype is not {manifest['dtype']}; do not use this cache"
        )


def grid(shape: list[int], chunk: list[int]) -> tuple[int, ...]:
    """Chunks along every axis."""
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def array_bytes(shape: list[int], dtype: str) -> int:
    """Bytes of an array."""
    return prod(shape) * np.dtype(dtype).itemsize
