"""A cache of many images: python tests/bench_scale.py [--small | --large]

10^5 and 10^6 images (10^7 with `--large`: 6 GB of disk, most of an hour) of one patch of 8 numbers, with a
caption each, in shards of 65,536. CPU time and peak memory, each in a process of its own, with exponents:
how they grow with the number of images. Opening, and the memory of opening and reading, may hardly grow.
Nor may that of the source `llava_json` over size, identity and all records of 10^5 and 10^6 entries, the
two of each image far apart. Linux only (/proc).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import caches

from fedcmp.pipeline.cache import CacheWriter, FeatureCache, Row

SHARD = 1 << 16
READ = 20_000
BATCH = 32
GATE = 0.3


def rows(start: int, end: int) -> Iterator[Row]:
    for number in range(start, end):
        text = ("caption", "train", f"a picture of {number} things, {number % 7} of them red")
        yield Row(f"folder/{number:09d}.jpg", f"{number + 1:064x}", 0, "", (text,))


def write(path: Path, images: int) -> None:
    layout = {"patches": 1, "d_vision": 8, "dtype": "bfloat16", "shard_images": SHARD}
    writer = CacheWriter(path, caches.identity(), **layout)
    rng = np.random.default_rng(0)
    for shard, start in enumerate(range(0, images, SHARD)):
        end = min(start + SHARD, images)
        stored = rng.integers(0, 1 << 14, (end - start, 1, 8), np.uint16)
        writer.write(shard, stored, list(rows(start, end)))
    writer.commit({"silo": path.stem, "skipped": []})


def opened(path: Path) -> None:
    """Until the first picture is there."""
    cache = FeatureCache(path)
    cache.read([cache.images // 2])


def first_text(path: Path) -> None:
    """Which reads where each of them is, 10 bytes a text."""
    cache = FeatureCache(path)
    cache.text(cache.texts // 2)


def shuffled(path: Path) -> None:
    """So many pictures with their texts, drawn at random."""
    from fedcmp.pipeline.cache.loader import stored_batches

    cache = FeatureCache(path)
    usable = cache.usable_texts("train")
    chosen = np.random.default_rng(1).choice(usable, min(READ, len(usable)), replace=False)
    samples = np.stack([np.zeros(len(chosen), np.int64), cache.text_image[chosen]], 1)
    batches = stored_batches([cache], samples, BATCH)
    for start in range(0, len(chosen), BATCH):
        next(batches)
        for index in chosen[start : start + BATCH]:
            cache.text(int(index))


def named(path: Path) -> None:
    """Every id."""
    assert sum(1 for _ in FeatureCache(path).ids) == FeatureCache(path).images


def verified(path: Path) -> None:
    from fedcmp.pipeline.cache.verify import verify

    assert verify(path) == []


def write_json(path: Path, entries: int) -> None:
    with path.open("w") as file:
        for number in range(entries):
            image = f"folder/{number % -(-entries // 2):09d}.jpg"
            said = f"a picture of {number} things, {number % 7} of them red; " + "and so on, " * 20
            turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": said}]
            entry = {"id": str(number), "image": image, "conversations": turns}
            file.write(f"{',' if number else '['}\n{json.dumps(entry)}")
        file.write("\n]\n")


def listed(path: Path) -> None:
    """What extraction asks of a source; the pictures are not there."""
    from fedcmp.extract.sources.llava_json import LlavaJson

    source = LlavaJson(path=path, images=path.parent / "images")
    source.identity()
    assert sum(1 for _ in source.records()) == source.size()


CACHE_WAYS = {"open": opened, "text": first_text, "shuffled": shuffled, "ids": named, "verify": verified}
WAYS = CACHE_WAYS | {"json": listed}


def measured(way: str, path: Path) -> tuple[float, float]:
    """CPU seconds and MB of one way in a process of its own, libraries included."""
    command = [sys.executable, __file__, "--way", way, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def exponent(few: float, many: float, times: float) -> float:
    """k in `many = few · times^k`."""
    return math.log(many / few) / math.log(times)


def main(sizes: list[int]) -> int:
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for images in sizes:
            path = Path(folder) / f"{images}.zarr"
            subprocess.run([sys.executable, __file__, "--write", str(path), str(images)], check=True)
            for way in CACHE_WAYS:
                # The faster of three; opening is a matter of milliseconds.
                tries = [measured(way, path) for _ in range(3 if way in ("open", "text") else 1)]
                best = min(seconds for seconds, _ in tries), max(peak for _, peak in tries)
                figures.setdefault(way, []).append(best)
                print(f"{images:>10,} images, {way:9}{best[0]:9.3f} s{best[1]:8.0f} MB", flush=True)
        for entries in sizes[:2]:
            path = Path(folder) / f"{entries}.json"
            write_json(path, entries)
            figures.setdefault("json", []).append(measured("json", path))
            seconds, peak = figures["json"][-1]
            size = path.stat().st_size / 1e6
            print(f"{entries:>10,} entries, {size:.0f} MB of JSON{seconds:9.3f} s{peak:8.0f} MB", flush=True)
            path.unlink()
    missed = 0
    for way, each in figures.items():
        growth = [exponent(each[0][what], each[-1][what], sizes[len(each) - 1] / sizes[0]) for what in (0, 1)]
        for what, gated, found in (
            ("seconds", way == "open", growth[0]),
            ("memory", way in ("open", "shuffled", "json"), growth[1]),
        ):
            verdict = ("passed" if found <= GATE else "MISSED") if gated else "      "
            missed += gated and found > GATE
            print(f"{verdict} {way}, exponent of {what}: {found:.2f}")
    return 1 if missed else 0


if __name__ == "__main__":
    if "--write" in sys.argv:
        write(Path(sys.argv[-2]), int(sys.argv[-1]))
    elif "--way" in sys.argv:
        import torch  # noqa: F401 - of the libraries, whose memory does not depend on the cache

        began = time.process_time()
        WAYS[sys.argv[-2]](Path(sys.argv[-1]))
        took = time.process_time() - began
        status = Path("/proc/self/status").read_text()
        print(json.dumps([took, int(status.split("VmHWM:")[1].split()[0]) / 1024]))
    elif "--small" in sys.argv:
        main([1_000, 10_000])
    else:
        sys.exit(main([10**5, 10**6, 10**7] if "--large" in sys.argv else [10**5, 10**6]))
