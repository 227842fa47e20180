"""A shard of features streamed to disk, while other threads compute its checksums and its hash."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedcmp.pipeline.cache.format import ABSENT, CRC_BYTES, INDEX_DTYPE, crc, crc_bytes

# Blocks are hashed by a thread of its own, at most so many after they were written.
_BLOCK = 1 << 24
_BEHIND = 2


def stream_shard(path: Path, images: Iterable[np.ndarray], shard_images: int) -> str:
    """Write a shard durably while other threads compute its checksums and its hash.

    Args:
        path: The file.
        images: Features of each image; at most `shard_images`, and none changed afterwards.
        shard_images: Places in the shard's index.

    Returns:
        The file's SHA-256.
    """
    index = np.full((shard_images, 2), ABSENT, INDEX_DTYPE)
    digest, offset = hashlib.sha256(), 0

    def add(pieces: list[Any]) -> None:
        for piece in pieces:
            digest.update(piece)

    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as summer,
    ):
        hashing: deque[Future[None]] = deque()
        block, held = list[Any](), 0

        def put(*pieces: Any) -> None:
            nonlocal block, held
            write_all(file, pieces)
            block += pieces
            held += sum(len(piece) for piece in pieces)
            if held >= _BLOCK:
                hashing.append(hasher.submit(add, block))
                block, held = [], 0
            if len(hashing) > _BEHIND:
                # The disk can work while this thread has to wait.
                os.fdatasync(file.fileno())
                hashing.popleft().result()

        for position, (data, checksum) in enumerate(_summed(images, summer)):
            put(data, crc_bytes(checksum.result()))
            index[position] = offset, len(data) + CRC_BYTES
            offset += len(data) + CRC_BYTES
        put(index.tobytes(), crc_bytes(crc(index.tobytes())))
        hasher.submit(add, block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _summed(
    images: Iterable[np.ndarray], summer: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, Future[int]]]:
    """Bytes of every image with their crc32c, which is computed while the image before is written."""
    waiting: list[tuple[np.ndarray, Future[int]]] = []
    for image in images:
        data = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
        waiting.append((data, summer.submit(crc, data)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def write_all(file: IO[bytes], pieces: Sequence[Any]) -> None:
    """Write pieces to an unbuffered file in one call of the system, mostly."""
    left = [memoryview(piece).cast("B") for piece in pieces]
    while left:
        written = os.writev(file.fileno(), left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]
