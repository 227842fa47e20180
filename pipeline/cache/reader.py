"""Reading a committed cache: features row by row, everything checked by its crc32c."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.pipeline.cache.files import Ranged, open_files
from fedcmp.pipeline.cache.format import (
    ABSENT,
    CRC_BYTES,
    INDEX_DTYPE,
    MANIFEST_LIMIT,
    QUANT_ARRAYS,
    SMALL_ARRAYS,
    STATUS,
    CorruptCacheError,
    array_bytes,
    array_metadata,
    chunk_bytes,
    crc,
    crc_bytes,
    differences,
    grid,
    parse_manifest,
    require_plain,
    shard_name,
)
from fedcmp.pipeline.cache.int8 import Quantiser
from fedcmp.pipeline.cache.locks import partial_path
from fedcmp.pipeline.cache.mirror import pull
from fedcmp.pipeline.cache.strings import Bytes, Strings
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.records import KINDS, SPLITS, Text, improper
from fedcmp.pipeline.remote import Remote

if TYPE_CHECKING:
    import torch


class FeatureCache:
    """Read a committed cache; features are checked by crc32c.

    Args:
        path: The cache's directory, or a zip of it that compresses nothing.

    Raises:
        UserError: There is no manifest, its format is unknown, or a file is missing or has another
            size than the manifest says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = open_files(path)
        if self._files.size("manifest.json") is None:
            state = "is unfinished" if partial_path(path).exists() else "does not exist"
            raise UserError(f"{path}: this feature cache {state}; run 'fedcmp extract' first")
        data = self._files.read("manifest.json", MANIFEST_LIMIT)
        self.manifest = parse_manifest(data, str(path / "manifest.json"))
        self._sizes: dict[str, int] = {name: size for name, (size, _) in self.manifest["files"].items()}
        for name, found in self._files.sizes(self._sizes):
            size = self._sizes[name]
            if found != size:
                raise CorruptCacheError(f"{path / name}: missing or not {size} bytes long; extract it again")
        self.images: int = self.manifest["images"]
        self.texts: int = self.manifest["texts"]
        self.patches: int = self.manifest["patches"]
        self.d_vision: int = self.manifest["d_vision"]
        self.cache_key: str = self.manifest["cache_key"]
        self.dtype = np.dtype(self.manifest["storage_dtype"])
        self._stride = chunk_bytes(self.manifest) + CRC_BYTES
        self._shard_images: int = self.manifest["shard_images"]
        # An index that says what every index of ours says is not kept.
        self._known = np.zeros(-(-self.images // self._shard_images), bool)
        self._odd: dict[int, np.ndarray] = {}

    @cached_property
    def content(self) -> str:
        """SHA-256 of the table of files: equal content, equal training."""
        return fingerprint(self.manifest["files"])

    def array(self, name: str) -> np.ndarray:
        """One of the small arrays, whole.

        Raises:
            CorruptCacheError: A chunk fails its crc32c, or shape, dtype or codecs are not what the
                manifest implies.
        """
        dtype, shape, chunk = self._described(name)
        out = np.zeros(shape, dtype)
        for place_in_grid in product(*map(range, grid(shape, chunk))):
            file = f"{name}/c/{'/'.join(map(str, place_in_grid))}"
            # zarr leaves chunks out that hold nothing but zeros.
            if file in self._sizes:
                inside = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place_in_grid, chunk, strict=True))
                part = self._chunk(file, array_bytes(chunk, dtype)).view(dtype).reshape(chunk)
                target = out[inside]
                target[...] = part[tuple(slice(0, n) for n in target.shape)]
        return out

    def _described(self, name: str) -> tuple[str, list[int], list[int]]:
        """Dtype, shape and chunks of a small array."""
        place = str(self.path / name)
        dtype = (SMALL_ARRAYS | QUANT_ARRAYS)[name]
        if f"{name}/zarr.json" not in self._sizes:
            raise CorruptCacheError(f"{place}: there is no such array; do not use this cache")
        metadata = array_metadata(self._files.read(f"{name}/zarr.json", 1 << 16), f"{place}/zarr.json")
        require_plain(metadata, dtype, f"{place}/zarr.json")
        shape, chunk = metadata["shape"], metadata["chunk"]
        held = sum(size for file, size in self._sizes.items() if file.startswith(f"{name}/c/"))
        wanted = self._shape(name)
        fits = shape == wanted if wanted else len(shape) == 1 and array_bytes(shape, dtype) <= held
        if not fits:
            raise CorruptCacheError(
                f"{place}: shape {shape} instead of {wanted or [held]}; do not use this cache"
            )
        return dtype, shape, chunk

    def _bytes(self, name: str) -> Bytes:
        """The bytes of strings, which may be more than fit into memory."""
        _, (length,), (size,) = self._described(name)
        files = [f"{name}/c/{number}" for number in range(-(-length // size))]
        lengths = [min(size, length - number * size) for number in range(len(files))]
        return Bytes(
            [(own, partial(self._checked, file, size)) for file, own in zip(files, lengths, strict=True)]
        )

    def _checked(self, file: str, size: int) -> Ranged | None:
        """A chunk that was found right as a whole; None where there is nothing but zeros in it."""
        if file not in self._sizes:
            return None
        self._chunk(file, size)
        return self._files.ranged(file, self._sizes[file])

    def _shape(self, name: str) -> list[int] | None:
        """What the manifest implies; None for the bytes of strings, of which it knows no number."""
        images, texts = self.images, self.texts
        return {
            "images/sha256": [images, 32],
            "images/status": [images],
            "images/id_offsets": [images + 1],
            "texts/offsets": [texts + 1],
            "texts/image_index": [texts],
            "texts/kind": [texts],
            "texts/split": [texts],
            "quant/channel_mean": [self.d_vision],
            "quant/channel_step": [self.d_vision],
        }.get(name)

    def _chunk(self, file: str, size: int) -> np.ndarray:
        if self._sizes[file] != size + CRC_BYTES:
            raise CorruptCacheError(
                f"{self.path / file}: not {size + CRC_BYTES} bytes long; do not use this cache"
            )
        data = np.frombuffer(self._files.read(file, size + CRC_BYTES), np.uint8)
        if crc_bytes(crc(data[:size])) != data[size:].tobytes():
            raise CorruptCacheError(
                f"{self.path / file}: bytes 0 to {len(data)} fail their checksum; extract this silo "
                "with --overwrite"
            )
        return data[:size]

    @cached_property
    def ids(self) -> Strings:
        """Image ids in row order, read when asked for; each may name a file in a folder, none one outside.

        Raises:
            CorruptCacheError: One of them is no such name.
        """
        offsets, data = self.array("images/id_offsets"), self._bytes("images/id_bytes")
        self._require_ascending("images/id_offsets", offsets, len(data))
        names = Strings(offsets, data)
        try:
            for name in names:
                if why := improper(name):
                    raise self._wrong("images/id_bytes", f"{ascii(name)[:200]} cannot name an image: {why}")
        except UnicodeDecodeError as error:
            raise self._wrong("images/id_bytes", f"an id is not UTF-8 ({error.reason})") from None
        return names

    @cached_property
    def status(self) -> np.ndarray:
        """`(images,)` uint8: index into `STATUS`; only rows with 0 have features."""
        status = self.array("images/status")
        if (status >= len(STATUS)).any():
            raise self._wrong("images/status", f"holds {status.max()}; there are only {len(STATUS)} states")
        return status

    @cached_property
    def text_image(self) -> np.ndarray:
        """`(texts,)` int64: the image row of each text."""
        image = self.array("texts/image_index")
        if len(image) and (image.min() < 0 or image.max() >= self.images):
            raise self._wrong("texts/image_index", f"names images beyond the {self.images} there are")
        return image

    @cached_property
    def text_arrays(self) -> tuple[np.ndarray, Bytes, np.ndarray, np.ndarray]:
        """`(texts + 1,)` offsets into the bytes of all texts, these bytes, kinds and splits."""
        offsets, data = self.array("texts/offsets"), self._bytes("texts/bytes")
        kinds, splits = self.array("texts/kind"), self.array("texts/split")
        self._require_ascending("texts/offsets", offsets, len(data))
        if (kinds >= len(KINDS)).any() or (splits >= len(SPLITS)).any():
            raise self._wrong("texts/kind", "a kind or split that does not exist")
        return offsets, data, kinds, splits

    def _require_ascending(self, name: str, offsets: np.ndarray, end: int) -> None:
        if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
            raise self._wrong(name, "does not ascend from 0 to the number of bytes")

    def _wrong(self, name: str, what: str) -> CorruptCacheError:
        return CorruptCacheError(f"{self.path / name}: {what}; do not use this cache")

    def text(self, index: int) -> Text:
        """One text.

        Raises:
            CorruptCacheError: It is none.
        """
        offsets, data, kinds, splits = self.text_arrays
        content = data[int(offsets[index]) : int(offsets[index + 1])]
        try:
            return Text.decode(content, KINDS[kinds[index]], SPLITS[splits[index]])
        except (ValueError, TypeError, RecursionError):
            raise self._wrong("texts/bytes", f"text {index} is no {KINDS[kinds[index]]}") from None

    def usable_texts(self, split: str, *, preferences: bool = False) -> np.ndarray:
        """Indices of the texts of a split whose image has features, ascending int64.

        Args:
            split: What they are for.
            preferences: Those between two answers alone, which nobody else gets.
        """
        *_, kinds, splits = self.text_arrays
        wanted = (splits == SPLITS.index(split)) & ((kinds == KINDS.index("preference")) == preferences)
        return np.flatnonzero(wanted & (self.status[self.text_image] == 0))

    @cached_property
    def quantiser(self) -> Quantiser | None:
        """What int8 features mean; None for floating-point features."""
        if self.manifest["dtype"] != "int8":
            return None
        return Quantiser(self.array("quant/channel_mean"), self.array("quant/channel_step"))

    def read(
        self, rows: Sequence[int] | np.ndarray, out: np.ndarray | None = None, *, check: bool = True
    ) -> np.ndarray:
        """Features of images, copied: `(len(rows), patches, d_vision)` in the storage dtype.

        Args:
            rows: Rows in any order.
            out: C-contiguous array to fill instead of a new one.
            check: Verify the crc32c of what was copied; False only right after `fedcmp cache verify`.

        Raises:
            CorruptCacheError: A chunk or shard index fails its crc32c.
            IndexError: There is no such row.
        """
        if out is None:
            out = np.empty((len(rows), self.patches, self.d_vision), self.dtype)
        if out.shape != (len(rows), self.patches, self.d_vision) or out.dtype != self.dtype:
            raise ValueError(f"out is {out.dtype} {out.shape}")
        targets = out.reshape(len(rows), -1).view(np.uint8)
        for target, row in zip(targets, rows, strict=True):
            self.copy(int(row), target, check=check)
        return out

    def copy(self, row: int, target: np.ndarray, *, check: bool = True) -> None:
        """Features of one image into `(bytes,)` uint8; see `read`."""
        if not 0 <= row < self.images:
            raise IndexError(f"row {row} of {self.images}")
        shard, position = divmod(row, self._shard_images)
        file, places = self._shard(shard)
        offset, length = self._place(places, position)
        end, size = offset + length, len(target)
        whole, stored = length == size + CRC_BYTES and end <= file.size, bytearray(CRC_BYTES)
        if whole:
            file.read(offset, target, *([stored] if check else []))
        # Of the copy, as the file may change at any time.
        if not whole or (check and crc_bytes(crc(target)) != stored):
            raise CorruptCacheError(
                f"{self.path / shard_name(shard)}: bytes {offset} to {end} "
                f"(image '{self.ids[row]}') fail their checksum; extract this silo with --overwrite"
            )

    def places(self, shard: int) -> list[list[int]]:
        """Offset and length of every image in a shard's file."""
        places = self._shard(shard)[1]
        return [list(self._place(places, position)) for position in range(self._shard_images)]

    def will_need(self, rows: Sequence[int] | np.ndarray) -> None:
        """Have the system read features ahead that are asked for soon."""
        for row in rows:
            shard, position = divmod(int(row), self._shard_images)
            file, places = self._shard(shard)
            offset, length = self._place(places, position)
            if offset + length <= file.size:
                file.will_need(offset, offset + length)

    def decoded(self, stored: torch.Tensor) -> torch.Tensor:
        """Features as stored to the logical dtype: bfloat16 shares its memory, int8 becomes float32."""
        import torch

        if self.quantiser is not None:
            return self.quantiser.decode(stored)
        return stored.view(torch.bfloat16) if self.manifest["dtype"] == "bfloat16" else stored

    def tensor(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Features of images as a tensor `(len(rows), patches, d_vision)` in the logical dtype."""
        import torch

        return self.decoded(torch.from_numpy(self.read(rows)))

    def _place(self, places: np.ndarray | None, position: int) -> tuple[int, int]:
        """Offset and length of an image in its shard, where one may follow the other."""
        if places is None:
            return position * self._stride, self._stride
        offset, length = places[position].tolist()
        return offset, length

    def _shard(self, shard: int) -> tuple[Ranged, np.ndarray | None]:
        """A shard's file, and offset and length of its images there: `(shard_images, 2)` uint64.

        None in place of these where the images lie one after the other.
        """
        name = shard_name(shard)
        file = self._files.ranged(name, self._sizes[name])
        if not self._known[shard]:
            end = file.size - CRC_BYTES
            start = end - self._shard_images * 2 * INDEX_DTYPE.itemsize
            index, stored = np.empty(max(end - max(start, 0), 0), np.uint8), bytearray(CRC_BYTES)
            if start >= 0:
                file.read(start, index, stored)
            if start < 0 or crc_bytes(crc(index)) != stored:
                raise CorruptCacheError(
                    f"{self.path / name}: bytes {max(start, 0)} to {end + CRC_BYTES} (its index) fail their "
                    "checksum; extract this silo with --overwrite"
                )
            places = index.view(INDEX_DTYPE).reshape(-1, 2)
            lengths = np.full(self._shard_images, self._stride, np.int64)
            usual = np.stack([np.cumsum(lengths) - lengths, lengths], 1).astype(INDEX_DTYPE)
            usual[min(self.images - shard * self._shard_images, self._shard_images) :] = ABSENT
            if not np.array_equal(places, usual):
                self._odd[shard] = places
            self._known[shard] = True
        return file, self._odd.get(shard)


def open_cache(experiment: Experiment, silo: str) -> FeatureCache:
    """The cache of a silo of an experiment, or one that a partner site put beside them.

    It is verified wholly, unless that was done before and nothing changed since.

    Raises:
        UserError: There is none, with the nearest name where the silo is not configured either; or it is
            damaged, older than the one before, or not signed by the key that is trusted for the silo.
    """
    # Verifying reads through this module.
    from fedcmp.pipeline.handover.receive import received

    path = experiment.cache_path(silo)
    if experiment.store is not None:
        pull(Remote(experiment.store) / path.name, path)
    packed = path.with_name(f"{path.name}.zip")
    trust = experiment.trust.get(silo)
    if not path.exists() and packed.is_file():
        return received(packed, silo=silo, trust=trust)
    if silo not in experiment.extract.silos and not path.exists():
        hint = did_you_mean(silo, experiment.extract.silos)
        raise UserError(f"no silo '{silo}' in extract.silos, and no cache {path}{hint}")
    return received(path, silo=silo, trust=trust)


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
