"""Kill -9 at random moments: python tests/soak_kills.py [--kills 2000] [--seed 0]

Each operation runs in a forked child that is killed after a random time, again and again until it
ends by itself. After every kill what lies at the final place is either nothing or whole and right;
at the end it is byte for byte what an undisturbed run makes. Linux only (fork).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

# Before the forks, so that no child imports anything.
import caches
import h5py  # noqa: F401
import numpy as np
import torch
import zarr.codecs  # noqa: F401
import zstandard  # noqa: F401
from PIL import Image

from fedcmp.extract.encoders.base import LoadedEncoder
from fedcmp.extract.silo import extract_silo
from fedcmp.extract.sources.base import Source
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.cache.derive import merge, subset
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.config import Extract
from fedcmp.pipeline.console import Task
from fedcmp.pipeline.handover import hdf5, signature  # noqa: F401
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.unpack import unpack
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.records import Record, caption

IMAGES = 48


class Blots(Source):
    """Pictures of one colour each, and one that is none."""

    def records(self) -> Iterator[Record]:
        for number in range(IMAGES):
            data = b"P6\n2 2\n255\n" + bytes([number] * 12) if number != 7 else b"none"
            yield Record(f"{number}.ppm", data, (caption(f"blot {number}"),))

    def identity(self) -> dict[str, Any]:
        return {"name": "blots"}

    def size(self) -> int:
        return IMAGES


class Means(LoadedEncoder):
    """Features without a model."""

    patches, d_vision = 4, 16

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image, np.float32)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))[:, None, None] * torch.arange(1.0, 65.0).view(4, 16)


def extract(path: Path) -> None:
    """The real runner on a source and an encoder that cost nothing."""
    options = Extract(
        encoder=Component(name="none"), silos={"s": Component(name="none")}, shard_images=4, workers=1
    )
    identity = caches.identity("blots")
    extract_silo(path, Blots(split="train"), identity, Means(), options, "cpu", Task("", None, "", None))


def tree(path: Path) -> str:
    """Hash of a file, or of every file's name and bytes in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(
        b"".join(str(file.relative_to(path)).encode() + file.read_bytes() for file in files)
    ).hexdigest()


def killed(work: Callable[[], Any], after: float) -> bool:
    """Run in a child for some seconds; False where it ended before."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the operation failed by itself"
        return False
    return True


def main(kills: int, seed: int, root: Path) -> dict[str, int]:
    """Kill every operation about equally often.

    Returns:
        How often each was killed.
    """
    torch.set_num_threads(1)
    stored = caches.features(IMAGES, 16, 64)
    whole = caches.write(root / "whole.zarr", stored, shard=6)
    halves = {
        name: subset(whole, root / f"{name}.zarr", ids=whole.ids[start:end])
        for name, start, end in (("a", 0, 20), ("b", 20, IMAGES))
    }
    for option in ("plain", "zstd", "hdf5"):
        pack(whole.path, root / option, zstd=option == "zstd", hdf5=option == "hdf5")
    operations: dict[str, Callable[[Path], Any]] = {
        "extract": extract,
        "pack": lambda out: pack(whole.path, out, overwrite=True),
        "pack --zstd": lambda out: pack(whole.path, out, zstd=True, overwrite=True),
        "pack --hdf5": lambda out: pack(whole.path, out, hdf5=True, overwrite=True),
        "unpack": lambda out: unpack(root / "plain", out, overwrite=True),
        "unpack zstd": lambda out: unpack(root / "zstd", out, overwrite=True),
        "unpack hdf5": lambda out: unpack(root / "hdf5", out, overwrite=True),
        "merge": lambda out: merge(halves, out),
    }
    rng = random.Random(seed)
    wanted = -(-kills // len(operations))
    counts = {}
    for name, work in operations.items():
        place = root / name.replace(" ", "") / "out.zarr"
        place.parent.mkdir()
        start = time.monotonic()
        work(place)
        seconds, right = time.monotonic() - start, tree(place)
        counts[name] = 0
        while counts[name] < wanted:
            shutil.rmtree(place.parent)
            place.parent.mkdir()
            while killed(lambda: work(place), rng.uniform(0, 0.9 * seconds)):  # noqa: B023
                counts[name] += 1
                if place.exists():
                    assert tree(place) == right, f"{name}: something half-written at its final place"
                # It may never end by itself where it starts anew each time.
                if counts[name] >= wanted:
                    break
            work(place)
            assert tree(place) == right, f"{name}: other bytes after kills"
            kept = (".lock", ".verified.json", ".verified.json.tmp")
            left = {file.name for file in place.parent.iterdir() if not file.name.endswith(kept)}
            assert left == {"out.zarr"}, f"{name}: {left} left over"
            if place.is_dir():
                assert verify(place) == []
                FeatureCache(place).read(range(IMAGES))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for operation, number in main(given.kills, given.seed, Path(folder)).items():
            print(f"{operation}: killed {number} times, ended right every time")
