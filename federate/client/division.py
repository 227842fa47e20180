"""How a batch is divided into micro-batches: rows of about equal length, with little padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedcmp.pipeline.models.prompts import IGNORE_INDEX

# Rows of each micro-batch, int64 on the CPU, and the length that they are cut to.
Parts = list[tuple[Tensor, int]]
Division = Callable[[Tensor], Parts]


def micro_batches(labels: Tensor, samples: int, tokens: int | None = None) -> Parts:
    """Micro-batches of texts, the shortest first, each as long as its last supervised token.

    Args:
        labels: `(texts, length)` int64 on the CPU, `IGNORE_INDEX` where nothing is predicted.
        samples: Rows that a micro-batch has at most.
        tokens: Places that it has at most, padding included; a longer text is alone. Any number if None.
    """
    places = torch.arange(1, labels.shape[1] + 1)
    lengths = ((labels != IGNORE_INDEX) * places).amax(1)
    order = lengths.argsort(stable=True)
    sizes: list[int] = []
    size = 0
    for length in lengths[order].tolist():
        if size and (size == samples or (tokens is not None and (size + 1) * length > tokens)):
            sizes.append(size)
            size = 0
        size += 1
    return [(rows, int(lengths[rows[-1]])) for rows in order.split([*sizes, size])]
