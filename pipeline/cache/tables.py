"""A cache's columns of images and texts, built a row at a time: in memory are their bytes, never all rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fedcmp.pipeline.cache.format import STATUS, Row
from fedcmp.pipeline.records import KINDS, SPLITS


class _Packed:
    """Strings one after the other."""

    def __init__(self) -> None:
        self._lengths, self._data = array("q"), bytearray()

    def add(self, item: bytes) -> None:
        self._lengths.append(len(item))
        self._data += item

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`(items + 1,)` int64 offsets, and the bytes."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.frombuffer(self._lengths, np.int64), out=offsets[1:])
        return offsets, np.frombuffer(self._data, np.uint8)


class Texts:
    """Texts of images, added in the images' order."""

    def __init__(self) -> None:
        self._image, self._texts = array("q"), _Packed()
        self._kinds, self._splits = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._image)

    def add(self, image: int, texts: Sequence[tuple[str, str, str]]) -> None:
        """The texts of an image, as (kind, split, text)."""
        for kind, split, content in texts:
            self._image.append(image)
            self._kinds.append(KINDS.index(kind))
            self._splits.append(SPLITS.index(split))
            self._texts.add(content.encode())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that hold them."""
        offsets, data = self._texts.arrays()
        return {
            "texts/offsets": offsets,
            "texts/bytes": data,
            "texts/image_index": np.frombuffer(self._image, np.int64),
            "texts/kind": np.frombuffer(self._kinds, np.uint8),
            "texts/split": np.frombuffer(self._splits, np.uint8),
        }


class Table:
    """What a cache says about its images.

    Attributes:
        failures: Images without features, as manifests list them.
        notes: How many images have each note.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._digests, self._status, self._ids, self._texts = bytearray(), bytearray(), _Packed(), Texts()
        self.failures: list[dict[str, str]] = []
        self.notes: Counter[str] = Counter()
        for row in rows:
            self._texts.add(len(self._status), row.texts)
            self._digests += bytes.fromhex(row.sha256) if row.sha256 else bytes(32)
            self._status.append(row.status)
            self._ids.add(row.id.encode())
            if row.status:
                self.failures.append({"id": row.id, "status": STATUS[row.status], "reason": row.reason})
            else:
                self.notes.update(row.notes)

    @property
    def images(self) -> int:
        """Rows."""
        return len(self._status)

    @property
    def texts(self) -> int:
        """Texts of all rows."""
        return len(self._texts)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that hold it."""
        offsets, data = self._ids.arrays()
        return {
            "images/sha256": np.frombuffer(self._digests, np.uint8).reshape(-1, 32),
            "images/status": np.frombuffer(self._status, np.uint8),
            "images/id_offsets": offsets,
            "images/id_bytes": data,
            **self._texts.arrays(),
        }


def text_arrays(texts: Iterable[Sequence[tuple[str, str, str]]]) -> dict[str, np.ndarray]:
    """Texts of every image, as (kind, split, text), to the arrays that hold them."""
    table = Texts()
    for image, several in enumerate(texts):
        table.add(image, several)
    return table.arrays()
