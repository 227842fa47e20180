"""A cache's strings, read from its files one at a time or as they follow each other: 10 million fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import SupportsIndex, overload

import numpy as np

from fedcmp.pipeline.cache.files import Ranged

_WINDOW = 1 << 16
_TOGETHER = 4096


class Bytes:
    """The bytes of an array whose chunks are files; a chunk is checked when it is first read.

    No descriptor and hardly any memory is held.

    Args:
        chunks: Bytes of the array in each chunk, in order, and what checks the chunk and gives its file; None
            where it holds nothing but zeros.
    """

    def __init__(self, chunks: Sequence[tuple[int, Callable[[], Ranged | None]]]) -> None:
        self._starts = [0, *accumulate(size for size, _ in chunks)]
        self._checks = [check for _, check in chunks]
        self._files: dict[int, Ranged | None] = {}
        self._window = (0, b"")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(len(self))
        first, held = self._window
        if start >= first and end <= first + len(held):
            return held[start - first : end - first]
        # More is read only where one piece follows the other.
        if held and start == first + len(held):
            held = self._read(start, min(max(end, start + _WINDOW), len(self)))
        else:
            held = self._read(start, end)
        self._window = start, held
        return held[: end - start]

    def _read(self, start: int, end: int) -> bytes:
        out = bytearray(max(end - start, 0))
        at, chunk = start, bisect_right(self._starts, start) - 1
        while at < end:
            if chunk not in self._files:
                self._files[chunk] = self._checks[chunk]()
            file, stop = self._files[chunk], min(end, self._starts[chunk + 1])
            if file is not None:
                file.read(at - self._starts[chunk], memoryview(out)[at - start : stop - start])
            at, chunk = stop, chunk + 1
        return bytes(out)


class Strings(Sequence[str]):
    """Strings by place.

    Args:
        offsets: `(strings + 1,)` int64, ascending from 0 to the number of bytes.
        data: Their bytes, UTF-8.
    """

    def __init__(self, offsets: np.ndarray, data: Bytes) -> None:
        self._offsets, self._data = offsets, data

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        number = range(len(self))[place]
        return self._data[int(self._offsets[number]) : int(self._offsets[number + 1])].decode()

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Sequence) and len(self) == len(other)
        return same and all(ours == theirs for ours, theirs in zip(self, other, strict=True))  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _TOGETHER):
            ends = self._offsets[first : first + _TOGETHER + 1].tolist()
            block = self._data[ends[0] : ends[-1]]
            for start, end in pairwise(end - ends[0] for end in ends):
                yield block[start:end].decode()
