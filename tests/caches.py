"""Small feature caches without an encoder; imports no torch, so that soaks start fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedcmp.pipeline.cache import CacheWriter, FeatureCache, Identity, Quantiser, Row

KEY = {"encoder": {"name": "none", "layer": -2}, "dtype": "bfloat16"}
DTYPES = {"uint16": "bfloat16", "float16": "float16", "float32": "float32", "int8": "int8"}


def features(images: int, patches: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    """Random bfloat16 features, as their bits in uint16."""
    numbers = np.random.default_rng(seed).standard_normal((images, patches, width), np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def rows(images: int, failed: tuple[int, ...] = (), prefix: str = "é") -> list[Row]:
    """Image `i` has `i % 3` texts: a caption for training, then a conversation for testing."""
    talk = '[["user", "was?\\n<image>"], ["assistant", "ein Bild %d"]]'
    return [
        Row(
            f"{prefix}{i}.png",
            "" if i in failed else f"{i + 1:064x}",
            1 if i in failed else 0,
            "gone" if i in failed else "",
            (("caption", "train", f"Bild {i}"), ("conversation", "test", talk % i))[: i % 3],
        )
        for i in range(images)
    ]


def identity(source: str = "abc") -> Identity:
    return Identity(KEY, {"files": source})


def write(
    path: Path,
    stored: np.ndarray,
    *,
    shard: int = 4,
    failed: tuple[int, ...] = (),
    prefix: str = "é",
    quantiser: Quantiser | None = None,
    source: str = "abc",
) -> FeatureCache:
    """A whole cache of what is stored; a killed one goes on."""
    images, patches, width = stored.shape
    layout = {
        "patches": patches,
        "d_vision": width,
        "dtype": DTYPES[stored.dtype.name],
        "shard_images": shard,
    }
    writer = CacheWriter(path, identity(source), **layout)
    if quantiser is not None:
        writer.calibrate(lambda: quantiser)
    known = rows(images, failed, prefix)
    for number, start in enumerate(range(0, images, shard)):
        if writer.finished(number) is None:
            part = stored[start : start + shard].copy()
            for place in range(len(part)):
                if start + place in failed:
                    part[place] = 0
            writer.write(number, part, known[start : start + shard])
    return writer.commit({"silo": path.stem, "skipped": []})
