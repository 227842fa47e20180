"""Which entries of a large file are about the same image: a few bytes an entry, and no entry itself."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fedcmp.pipeline.records import Text

# Long enough that nobody finds two names, or two texts, of the same digest.
_DIGEST = 16


@dataclass(frozen=True)
class Mark:
    """What is kept of an entry.

    Attributes:
        byte: Where in the file it begins.
        image: The image it names, if it does.
        text: What it says about it, if it can be used.
    """

    byte: int
    image: str | None = None
    text: Text | None = None


@dataclass(frozen=True)
class Index:
    """Numbers of a file's entries, about 20 bytes for each.

    Attributes:
        offsets: `(entries + 1,)` uint64; entry n lies in the file's bytes `offsets[n]` to `offsets[n + 1]`.
        named: `(images,)` entries that are the first to name their image, in the file's order.
        left_out: `(k,)` entries without a text that can be used, or with one that came before.
    """

    offsets: np.ndarray
    named: np.ndarray
    left_out: np.ndarray
    _texts: np.ndarray
    _ends: np.ndarray

    @property
    def entries(self) -> int:
        """Number of entries."""
        return len(self.offsets) - 1

    def images(self) -> Iterator[list[int]]:
        """The entries with the texts of each image that has any; images in order of first mention."""
        start = 0
        for end in self._ends:
            yield self._texts[start:end].tolist()
            start = end


def index_of(marks: Iterable[Mark], size: int) -> Index:
    """Index all entries of a file of so many bytes."""
    offsets, names, texts = array("Q"), bytearray(), bytearray()
    nothing = bytes(_DIGEST)
    for mark in marks:
        offsets.append(mark.byte)
        names += nothing if mark.image is None else _digest(mark.image.encode())
        texts += nothing if mark.image is None or mark.text is None else _digest(_said(mark.image, mark.text))
    offsets.append(size)
    number = np.min_scalar_type(len(offsets))
    image, named = _first_equal(names, number)
    said, usable = _first_equal(texts, number)
    every = np.arange(len(image), dtype=number)
    kept = np.flatnonzero(usable & (said == every)).astype(number)
    # Of each image the first text that is kept, by which images are in order.
    first = np.zeros(len(image), number)
    first[image[kept[::-1]]] = kept[::-1]
    leader = first[image[kept]]
    order = np.argsort(leader, kind="stable")
    ends = np.flatnonzero(np.diff(leader[order], append=number.type(len(offsets)))) + 1
    left_out = np.ones(len(image), bool)
    left_out[kept] = False
    return Index(
        np.frombuffer(offsets, np.uint64),
        np.flatnonzero(named & (image == every)).astype(number),
        np.flatnonzero(left_out).astype(number),
        kept[order],
        ends.astype(number),
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _said(image: str, text: Text) -> bytes:
    # No name of an image holds the byte 0.
    return b"\0".join((image.encode(), text.kind.encode(), text.encode()))


def _first_equal(digests: bytearray, number: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """For each digest the number of the first that equals it, and whether it is one at all."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 0], halves[:, 1])).astype(number)
    new = np.ones(len(order), bool)
    new[1:] = False
    for half in halves.T:
        in_order = half[order]
        new[1:] |= in_order[1:] != in_order[:-1]
    place = np.cumsum(new, dtype=number)
    place -= 1
    first = np.empty(len(order), number)
    first[order] = order[new][place]
    return first, (halves[:, 0] | halves[:, 1]) != 0
