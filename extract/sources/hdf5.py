"""An HDF5 file: a dataset of pictures, and beside it captions or conversations of the same length.

Only what lies in the file itself is read: links to other files, virtual datasets and external storage
could name any file of this machine, so they are refused. It is read in a process of its own, as damage can
send libhdf5 into a crash or an endless loop.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.extract.shortage import shortage
from fedcmp.extract.sources import SOURCES, Record, Skipped, Source, UserError, stat_files, texts_of
from fedcmp.pipeline.apart import apart
from fedcmp.pipeline.errors import did_you_mean, one_line

_ROWS_AT_ONCE = 32
# How HDF5 quotes an error of the system, where damage has none.
_SYSTEM = re.compile(r"errno = [1-9]")
_AT_ONCE = 1 << 26
_LARGEST = 1 << 29


@SOURCES.register("hdf5")
class Hdf5(Source):
    """Pictures and texts row by row.

    Args:
        path: The HDF5 file.
        images: Dataset of encoded files (variable-length uint8, fixed strings or opaque), or of pixels:
            uint8 `(N, height, width, 3)`.
        captions: Dataset `(N,)` of captions, or `(N, k)` of several an image, the empty ones ignored.
        conversations: Dataset `(N,)` of JSON instead: LLaVA's list of turns, or a list of texts.
        ids: Dataset `(N,)` of image names; by default they are row numbers.
    """

    path: Path
    images: str = "images"
    captions: str | None = None
    conversations: str | None = None
    ids: str | None = None

    def records(self) -> Iterator[Record | Skipped]:
        """Yield rows in order, a few of them in memory at a time."""
        return apart(self.path, Hdf5.records_here, self)

    def records_here(self) -> Iterator[Record | Skipped]:
        """The same in this process, which a damaged file may crash or keep for ever."""
        with self._open() as file:
            images, others = self._datasets(file)
            seen: set[str] = set()
            longest = max(map(_row_bytes, [images, *others.values()]))
            step = min(_ROWS_AT_ONCE, max(_AT_ONCE // longest, 1))
            for start in range(0, len(images), step):
                stop = min(start + step, len(images))
                try:
                    yield from self._records(images, others, range(start, stop), seen)
                except MemoryError:
                    raise
                except Exception:  # h5py raises nearly anything on damaged files
                    for number in range(start, stop):
                        try:
                            yield from self._records(images, others, range(number, number + 1), seen)
                        except MemoryError:
                            raise
                        except Exception as error:
                            place = f"{self.path}[{number}]"
                            if shortage(error) or (isinstance(error, OSError) and _SYSTEM.search(str(error))):
                                # It may pass, and a hole in the cache would stay.
                                raise UserError(
                                    f"{place}: cannot be read ({error}); fix that and rerun to go on"
                                ) from None
                            yield Skipped(place, f"damaged: {one_line(error)}")

    def _records(
        self, images: Any, others: dict[str, Any], numbers: range, seen: set[str]
    ) -> list[Record | Skipped]:
        """Some rows, read at once.

        Raises:
            Exception: One of them is damaged.
        """
        rows = slice(numbers.start, numbers.stop)
        pictures = images[rows]
        if pictures.dtype.kind == "S":
            # As strings they would lose the zero bytes at their end.
            pictures = pictures.view(f"V{pictures.dtype.itemsize}")
        columns = {name: dataset[rows] for name, dataset in others.items()}
        return [
            self._record(number, pictures[place], {name: c[place] for name, c in columns.items()}, seen)
            for place, number in enumerate(numbers)
        ]

    def _record(self, number: int, picture: Any, row: dict[str, Any], seen: set[str]) -> Record | Skipped:
        place = f"{self.path}[{number}]"
        try:
            name = _string(row["ids"]) if "ids" in row else f"{number:09d}"
            if not name or name in seen:
                return Skipped(place, "a row of this name came before" if name else "its name is empty")
            seen.add(name)
            if "conversations" in row:
                texts = texts_of(json.loads(_string(row["conversations"])), self.split)
            else:
                several = np.atleast_1d(row.get("captions", np.array([], object)))
                texts = texts_of([text for text in map(_string, several) if text.strip()], self.split)
                if "captions" in row and not texts:
                    raise ValueError("its caption is empty")
        except (ValueError, RecursionError) as error:
            return Skipped(place, f"its text cannot be read: {error}")
        return Record(name, _encoded(picture), texts)

    def identity(self) -> dict[str, Any]:
        """Name, size and time of the file, and the datasets taken."""
        datasets = [self.images, self.captions, self.conversations, self.ids]
        return {
            "name": "hdf5",
            "split": self.split,
            "datasets": datasets,
            "file": stat_files([self.path]),
        }

    def size(self) -> int:
        """Number of rows."""
        (rows,) = apart(self.path, Hdf5._rows, self)
        return rows

    def _rows(self) -> Iterator[int]:
        with self._open() as file:
            yield len(self._datasets(file)[0])

    def _open(self) -> Any:
        try:
            import h5py
        except ImportError:
            raise UserError(f"{self.path}: reading HDF5 needs h5py; pip install h5py") from None
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; set 'path' to the HDF5 file")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise UserError(f"{self.path}: not a whole HDF5 file ({one_line(error)})") from None

    def _datasets(self, file: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return self._found(file)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # h5py raises nearly anything on damaged files
            raise UserError(f"{self.path}: not a whole HDF5 file ({one_line(error)})") from None

    def _found(self, file: Any) -> tuple[Any, dict[str, Any]]:
        images = self._dataset(file, self.images, "images")
        if not _holds_pictures(images):
            raise UserError(
                f"{self.path}: images = '{self.images}' holds {images.dtype} {images.shape}; expected "
                "encoded files as variable-length uint8 or fixed strings, or uint8 (N, height, width, 3)"
            )
        if self.captions and self.conversations:
            raise UserError(f"{self.path}: set either 'captions' or 'conversations', not both")
        named = {"captions": self.captions, "conversations": self.conversations, "ids": self.ids}
        others = {option: self._dataset(file, name, option) for option, name in named.items() if name}
        if not (self.captions or self.conversations) and "captions" in file:
            others["captions"] = self._dataset(file, "captions", "captions")
        for option, dataset in others.items():
            if dataset.dtype.kind not in "OS" or dataset.ndim > (2 if option == "captions" else 1):
                raise UserError(
                    f"{self.path}: '{dataset.name}' holds {dataset.dtype} {dataset.shape}, not strings"
                )
            if len(dataset) != len(images):
                raise UserError(
                    f"{self.path}: '{dataset.name}' has {len(dataset)} rows, '{images.name}' {len(images)}; "
                    "they must go together row by row"
                )
        return images, others

    def _dataset(self, file: Any, name: str, option: str) -> Any:
        import h5py

        found: Any = file
        for part in name.strip("/").split("/"):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                raise UserError(
                    f"{self.path}: {option} = '{name}': no such dataset{did_you_mean(name, _names(file))}"
                )
            if not isinstance(link, h5py.HardLink):
                raise UserError(f"{self.path}: '{part}' in '{name}' is a link; copy the data into the file")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or not found.shape:
            raise UserError(f"{self.path}: {option} = '{name}' is not a dataset of rows")
        if found.is_virtual or found.external:
            raise UserError(f"{self.path}: '{name}' takes its data from other files; copy them into this one")
        at_once = max(_row_bytes(found), prod(found.chunks or ()) * found.dtype.itemsize)
        if len(found) > self.path.stat().st_size or at_once > _LARGEST:
            raise UserError(
                f"{self.path}: '{name}' is {found.dtype} {found.shape} in chunks of {found.chunks}, more "
                "than such a file can hold; do not use it"
            )
        return found


def _row_bytes(dataset: Any) -> int:
    return int(prod(dataset.shape[1:]) * dataset.dtype.itemsize) or 1


def _names(file: Any) -> list[str]:
    import h5py

    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _holds_pictures(dataset: Any) -> bool:
    import h5py

    if dataset.ndim == 4:
        return bool(dataset.dtype == np.uint8 and dataset.shape[3] == 3 and min(dataset.shape[1:]) > 0)
    return dataset.ndim == 1 and (
        dataset.dtype.kind in "SV" or h5py.check_vlen_dtype(dataset.dtype) == np.dtype(np.uint8)
    )


def _encoded(picture: Any) -> bytes:
    """The bytes of a picture as Pillow reads them; pixels become PPM, which costs no compression."""
    if isinstance(picture, np.ndarray) and picture.ndim == 3:
        height, width, _ = picture.shape
        buffer = io.BytesIO()
        buffer.write(b"P6\n%d %d\n255\n" % (width, height))
        buffer.write(np.ascontiguousarray(picture).tobytes())
        return buffer.getvalue()
    return bytes(picture) if isinstance(picture, bytes) else picture.tobytes()


def _string(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
