"""Speed and memory of the feature cache: python tests/bench_cache.py [--small]

Images of 576 x 1024 in bfloat16 (1.18 MB). Every round measures each way once, ours and the baseline in
turns, so that other load hits both; a gate is the ratio of medians. Warm means that the files are in
the system's page cache. `--small` is a smoke run without gates. Linux only (/proc).
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import caches

from fedcmp.pipeline.cache.stream import stream_shard
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.unpack import unpack

PATCHES, WIDTH = 576, 1024
BATCH = 32
ROUNDS = 7


def bench_read(root: Path, images: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of reading warm files in several ways."""
    import torch
    import zarr

    from fedcmp.pipeline.cache.loader import stored_batches

    stored = np.random.default_rng(0).integers(0, 1 << 15, (images, PATCHES, WIDTH), np.uint16)
    cache = caches.write(root / "s.zarr", stored, shard=256)
    packed = type(cache)(pack(cache.path, root / "s.zip").path)
    stored.tofile(root / "flat")
    array = zarr.open_array(cache.path / "features/patch", mode="r", zarr_format=3)
    random = np.random.default_rng(1).permutation(images)
    sequential = np.arange(images)
    out = np.empty((BATCH, PATCHES, WIDTH), np.uint16)

    flat = np.memmap(root / "flat", np.uint16, "r", shape=stored.shape)

    def memmap(rows: np.ndarray) -> None:
        for start in range(0, images, BATCH):
            flat[rows[start : start + BATCH]]

    def memmap_reused(rows: np.ndarray) -> None:
        for place, row in enumerate(rows):
            out[place % BATCH] = flat[row]

    def ours(rows: np.ndarray, check: bool, source: Any = cache) -> None:
        for start in range(0, images, BATCH):
            part = rows[start : start + BATCH]
            source.read(part, out[: len(part)], check=check)

    def memmap_batches(rows: np.ndarray) -> None:
        for start in range(0, len(rows), BATCH):
            torch.from_numpy(flat[rows[start : start + BATCH]])

    def our_batches(rows: np.ndarray) -> None:
        samples = np.stack([np.zeros(len(rows), int), rows], 1)
        for _ in stored_batches([cache], samples, BATCH):
            pass

    # Enough that making the buffers, once a pass, is as small a part of it as in a real one.
    longer = np.concatenate([np.random.default_rng(seed).permutation(images) for seed in range(12)])
    few = random[: max(images // 8, 4)]
    ways: dict[str, tuple[Callable[[], None], int]] = {
        "memmap, sequential": (lambda: memmap(sequential), images),
        "memmap into a reused buffer, random": (lambda: memmap_reused(random), images),
        "ours, sequential": (lambda: ours(sequential, False), images),
        "ours + crc32c, sequential": (lambda: ours(sequential, True), images),
        "memmap, random": (lambda: memmap(random), images),
        "ours, random": (lambda: ours(random, False), images),
        "ours + crc32c, random": (lambda: ours(random, True), images),
        "zip in place + crc32c, random": (lambda: ours(random, True, packed), images),
        "zarr-python, random": (lambda: [array[row] for row in few], len(few)),  # type: ignore[dict-item]
        "memmap loop, batches": (lambda: memmap_batches(longer), len(longer)),
        "our batches + crc32c": (lambda: our_batches(longer), len(longer)),
    }
    return measure(ways, rounds, stored[0].nbytes)


def bench_write(root: Path, images: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of writing a shard in several ways."""
    stored = np.random.default_rng(0).integers(0, 1 << 15, (images, PATCHES, WIDTH), np.uint16)

    class Unhashed:
        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return ""

    def raw(sync: bool) -> None:
        with (root / "raw").open("wb") as file:
            for image in stored:
                file.write(image)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def without_hash_and_sync() -> None:
        with (
            mock.patch.object(os, "fsync"),
            mock.patch.object(os, "fdatasync"),
            mock.patch.object(hashlib, "sha256", Unhashed),
        ):
            stream_shard(root / "shard", stored, images)

    def whole() -> None:
        stream_shard(root / "shard", stored, images)

    ways: dict[str, tuple[Callable[[], None], int]] = {
        "raw write": (lambda: raw(False), images),
        "our write, crc32c": (without_hash_and_sync, images),
        "raw write + fsync": (lambda: raw(True), images),
        "our write, crc32c + SHA-256 + fsync": (whole, images),
    }

    def afresh() -> None:
        # What one way left to write to the disk is not another's to pay.
        for file in root.iterdir():
            file.unlink()
        os.sync()

    return measure(ways, rounds, stored[0].nbytes, before=afresh)


def measure(
    ways: dict[str, tuple[Callable[[], None], int]],
    rounds: int,
    size: int,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """GB/s by way, a figure a round; the order turns from round to round."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            before()
            work, images = ways[name]
            start = time.perf_counter()
            work()
            if round_:
                figures[name].append(images * size / 1e9 / (time.perf_counter() - start))
    return figures


def use(root: Path, images: int) -> None:
    """Write, verify, pack, unpack and read a cache in this process; prints its peak memory."""
    from fedcmp.pipeline.cache import CacheWriter
    from fedcmp.pipeline.cache.loader import stored_batches

    step, patches = 64, 144
    rng, rows = np.random.default_rng(0), caches.rows(images)
    layout = {"patches": patches, "d_vision": WIDTH, "dtype": "bfloat16", "shard_images": step}
    writer = CacheWriter(root / "s.zarr", caches.identity(), **layout)
    for shard, start in enumerate(range(0, images, step)):
        part = rng.integers(0, 1 << 14, (min(step, images - start), patches, WIDTH), np.uint16)
        writer.write(shard, part, rows[start : start + step])
    cache = writer.commit({"silo": "s", "skipped": []})
    pack(cache.path, root / "s.zip")
    received = unpack(root / "s.zip", root / "r.zarr").path
    assert verify(received) == []
    samples = np.stack([np.zeros(images, int), rng.permutation(images)], 1)
    for _ in stored_batches([type(cache)(received)], samples, BATCH):
        pass
    print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))


def peak(images: int) -> int:
    """Peak memory in bytes of a process that makes and uses so many images."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, __file__, "--use", folder, str(images)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(small: bool) -> int:
    images, rounds, few = (8, 1, 8) if small else (320, ROUNDS, 128)
    figures: dict[str, list[float]] = {}
    for bench, number in ((bench_read, images), (bench_write, images // 2)):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            figures |= bench(Path(folder), number, rounds)
    speed = {name: statistics.median(each) for name, each in figures.items()}
    print(f"\nGB/s, median of {rounds} rounds, {images} images of {PATCHES * WIDTH * 2 / 1e6:.2f} MB")
    for name, each in speed.items():
        print(f"{name:38}{each:8.2f}")
    memory = peak(few), peak(10 * few)
    print(
        f"peak memory: {memory[0] / 1e6:.0f} MB for {few} images, {memory[1] / 1e6:.0f} MB for {10 * few}\n"
    )
    gates = [
        ("warm sequential read / memmap", "ours, sequential", "memmap, sequential", 0.9),
        ("warm random read / memmap", "ours, random", "memmap, random", 0.9),
        ("sequential, crc32c verified", "ours + crc32c, sequential", "memmap, sequential", 0.7),
        ("random, crc32c verified", "ours + crc32c, random", "memmap, random", 0.7),
        ("shuffled torch batches / memmap loop", "our batches + crc32c", "memmap loop, batches", 0.7),
        ("read / zarr-python", "ours + crc32c, random", "zarr-python, random", 5),
        ("write with crc32c / raw write", "our write, crc32c", "raw write", 0.8),
        (
            "write with all and fsync / raw fsync",
            "our write, crc32c + SHA-256 + fsync",
            "raw write + fsync",
            0.6,
        ),
    ]
    missed = 0
    for gate, ours, base, least in gates:
        ratio = speed[ours] / speed[base]
        missed += ratio < least
        print(f"{'passed' if ratio >= least else 'MISSED'}: {gate}: {ratio:.2f} (at least {least})")
    growth = memory[1] / memory[0]
    missed += growth > 1.1
    verdict = "passed" if growth <= 1.1 else "MISSED"
    print(f"{verdict}: peak memory with 10 times the images: {growth:.2f} (at most 1.1)")
    return 1 if missed and not small else 0


if __name__ == "__main__":
    if "--use" in sys.argv:
        use(Path(sys.argv[-2]), int(sys.argv[-1]))
    else:
        sys.exit(main("--small" in sys.argv))
