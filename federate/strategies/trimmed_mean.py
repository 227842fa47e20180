"""Coordinate-wise trimmed mean (Yin et al., 2018, arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from pydantic import Field
from torch import Tensor

from fedcmp.federate.strategies import (
    STRATEGIES,
    Aggregate,
    Memory,
    State,
    Strategy,
    Update,
    by_coordinate,
    moved,
)


@STRATEGIES.register("trimmed_mean")
class TrimmedMean(Strategy):
    """W ← W + η_s mean of the W_k - W without the ⌊βK⌋ smallest and largest, in every coordinate.

    Every client counts alike, whatever its samples.

    Args:
        trim: β, share cut at each end; with fewer than 1 / β clients nothing is cut.
        server_learning_rate: η_s; 1 gives the trimmed mean of the clients.
    """

    trim: float = Field(0.2, ge=0, lt=0.5)
    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average what the ends leave over."""
        step = {name: by_coordinate(name, state, updates, self._mean) for name in state}
        return Aggregate(moved(state, step, self.server_learning_rate), memory)

    def _mean(self, stacked: Tensor) -> Tensor:
        ordered, cut = stacked.sort(0).values, floor(self.trim * len(stacked))
        return ordered[cut : len(stacked) - cut].mean(0)
