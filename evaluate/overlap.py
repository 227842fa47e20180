"""Pictures that a run was trained on and is judged by: its scores on them say little about other pictures."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedcmp.pipeline.cache import FeatureCache, open_cache
from fedcmp.pipeline.config import Experiment


def trained_on(experiment: Experiment, judged: FeatureCache, images: Collection[str]) -> int:
    """How many of a benchmark's pictures are training pictures too, byte for byte (SHA-256).

    Args:
        experiment: Names the silos; those whose caches are not on this machine are not looked at.
        judged: The cache of the benchmark's pictures.
        images: Their ids.
    """
    rows = [row for row, image in enumerate(judged.ids) if image in images]
    ours = judged.array("images/sha256")[rows]
    seen = np.zeros(len(rows), dtype=bool)
    for silo in experiment.federate.silos:
        path = experiment.cache_path(silo)
        packed = path.with_name(f"{path.name}.zip")
        if path.exists() or packed.is_file():
            cache = open_cache(experiment.model_copy(update={"store": None}), silo)
            trained = np.unique(cache.text_image[cache.usable_texts("train")])
            seen |= np.isin(_words(ours), _words(cache.array("images/sha256")[trained]))
    return int(seen.sum())


def _words(digests: np.ndarray) -> np.ndarray:
    """Digests `(n, 32)` uint8 as `(n,)` values that can be compared."""
    return np.ascontiguousarray(digests).view("S32").ravel()
