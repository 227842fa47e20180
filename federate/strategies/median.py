"""Coordinate-wise median (Yin et al., 2018, arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from federate.strategies.base import STRATEGIES, Aggregate, Memory, State, Strategy, Update


@STRATEGIES.register("median")
class Median(Strategy):
    """W ← median_k W_k in every coordinate; every client counts alike, whatever its samples."""

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Take the middle client in every coordinate, or the mean of the two in the middle."""
        return Aggregate(
            {name: _median([update.state[name] for update in updates]) for name in state}, memory
        )


def _median(tensors: Sequence[Tensor]) -> Tensor:
    ordered, number = torch.stack(list(tensors)).sort(0).values, len(tensors)
    return ((ordered[(number - 1) // 2].double() + ordered[number // 2]) / 2).to(ordered.dtype)
