"""Pixels as bytes until they are on the device, where a table says what each of the 256 levels becomes.

Scaling and normalising in numpy keep Python's lock, so threads that prepare pictures for a GPU wait for each
other, and float32 is four times as much to copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Prepare = Callable[[Image.Image], np.ndarray]


def levels_of(whole: Prepare, bare: Prepare, side: int) -> np.ndarray | None:
    """What a processor makes of every level of every channel: float32 `(3, 256)`.

    Args:
        whole: Prepares a picture, float32 `(3, height, width)`.
        bare: Does the same without scaling and normalising, uint8.
        side: Of the pictures that are tried.

    Returns:
        None where pixels do not become numbers one by one.
    """
    table = np.full((3, 256), np.nan, dtype=np.float32)
    for level in range(256):
        plain = Image.new("RGB", (side, side), (level, level, level))
        levels, values = bare(plain), whole(plain)
        if levels.dtype != np.uint8 or levels.ndim != 3 or levels.shape != values.shape:
            return None
        table[range(3), levels[:, 0, 0]] = values[:, 0, 0]
    generator = np.random.default_rng(0)
    for width, height in ((side, side), (2 * side + 3, side + 5)):
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if not np.array_equal(
            np.stack([row[each] for row, each in zip(table, bare(noise), strict=True)]), whole(noise)
        ):
            return None
    return None if np.isnan(table).any() else table


def looked_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Levels `(batch, 3, height, width)` uint8 as float32, by a table `(3, 256)` on the same device."""
    rows = 256 * torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
    return table.flatten()[pixels.int() + rows]
