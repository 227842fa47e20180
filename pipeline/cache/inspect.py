"""What is in a cache, and in what two caches differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.cache import STATUS, FeatureCache, differences
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import KINDS, SPLITS

_BINS = 12


def found(places: Sequence[Path]) -> list[Path]:
    """Caches at paths: themselves, or all that a folder holds.

    Raises:
        UserError: There is none.
    """
    caches: list[Path] = []
    for place in places:
        if (place / "manifest.json").is_file() or place.is_file():
            caches.append(place)
            continue
        inside = sorted(each for each in place.glob("*.zarr") if (each / "manifest.json").is_file())
        if not inside:
            raise UserError(f"{place}: no feature cache there; run 'fedcmp extract' first")
        caches += inside
    return caches


def summary(path: Path) -> dict[str, Any]:
    """A cache in a line."""
    cache = FeatureCache(path)
    manifest = cache.manifest
    return {
        "silo": path.name.removesuffix(".zip").removesuffix(".zarr"),
        "path": str(path),
        "images": cache.images,
        "failed": len(manifest["failures"]),
        "texts": cache.texts,
        "bytes": sum(size for size, _ in manifest["files"].values()),
        "shape": [cache.patches, cache.d_vision],
        "dtype": manifest["dtype"],
        "encoder": encoder_name(manifest["key"]),
        "key": cache.cache_key,
        "content": cache.content,
    }


def encoder_name(key: dict[str, Any]) -> str:
    """What people call the encoder of a cache."""
    encoder = key.get("encoder")
    if not isinstance(encoder, dict):
        return "?"
    files = encoder.get("files")
    files = files if isinstance(files, dict) else {}
    weights = [digest for name, digest in files.items() if name.endswith((".safetensors", ".bin"))]
    parts = [str(encoder.get("name", "?")), *(f"weights {digest[:8]}" for digest in weights[:1])]
    return ", ".join(parts + ([f"layer {encoder['layer']}"] if "layer" in encoder else []))


def inspection(path: Path, *, sample: int, texts: int) -> dict[str, Any]:
    """What a person wants to see of a cache.

    Args:
        path: The cache.
        sample: Images whose features are looked at, spread over the whole.
        texts: Texts to show, spread over the whole.
    """
    cache = FeatureCache(path)
    manifest = cache.manifest
    shown = [int(index) for index in np.linspace(0, cache.texts - 1, min(texts, cache.texts))]
    *_, kinds, splits = cache.text_arrays
    return {
        **summary(path),
        "manifest_sha256": hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        if path.is_dir()
        else None,
        "status": {name: int((cache.status == code).sum()) for code, name in enumerate(STATUS)},
        "splits": {name: int((splits == code).sum()) for code, name in enumerate(SPLITS)},
        "kinds": {name: int((kinds == code).sum()) for code, name in enumerate(KINDS)},
        "features": _features(cache, sample),
        "int8": manifest.get("int8"),
        "made_from": {"key": manifest["key"], "source": manifest["source"]},
        "made_by": manifest.get("made_by"),
        "licence": manifest.get("licence"),
        "sample_texts": [
            {
                "image": cache.ids[cache.text_image[index]],
                "turns": [[turn.role, turn.content] for turn in cache.text(index).turns],
            }
            for index in shown
        ],
    }


def _features(cache: FeatureCache, sample: int) -> dict[str, Any]:
    usable = np.flatnonzero(cache.status == 0)
    chosen = usable[np.linspace(0, len(usable) - 1, min(sample, len(usable))).astype(int)]
    numbers = np.stack([cache.tensor([row])[0].float().numpy() for row in chosen])
    finite = numbers[np.isfinite(numbers)]
    # Between these two, as outlier channels would leave everything else in one bar.
    low, high = np.quantile(finite, (0.001, 0.999)) if finite.size else (0.0, 1.0)
    counts, edges = np.histogram(
        finite, bins=_BINS, range=(float(low), float(high) if high > low else low + 1.0)
    )
    size = np.abs(numbers).reshape(-1, cache.d_vision).max(0)
    return {
        "images": len(chosen),
        "not_finite": int(numbers.size - finite.size),
        "zero_images": int((~numbers.any(axis=(1, 2))).sum()),
        "mean": float(finite.mean()) if finite.size else None,
        "std": float(finite.std()) if finite.size else None,
        "smallest": float(finite.min()) if finite.size else None,
        "largest": float(finite.max()) if finite.size else None,
        "outlier_channels": [int(channel) for channel in np.argsort(-size)[:3]],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def difference(first: Path, second: Path) -> dict[str, list[str]]:
    """In what two caches differ: how they were made, what they hold, where from, which files."""
    one, two = FeatureCache(first), FeatureCache(second)
    held = ("images", "texts", "patches", "d_vision", "shard_images", "dtype", "failures", "skipped", "probe")
    other = ("made_by", "licence", "silo", "int8", "texts_left_out", "texts_from")

    def of(names: Sequence[str]) -> list[str]:
        return differences(
            {name: one.manifest.get(name) for name in names}, {name: two.manifest.get(name) for name in names}
        )

    ours, theirs = one.manifest["files"], two.manifest["files"]
    files = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return {
        "key": differences(one.manifest["key"], two.manifest["key"]),
        "source": differences(one.manifest["source"], two.manifest["source"]),
        "content": of(held),
        "made": of(other),
        "files": files,
    }
