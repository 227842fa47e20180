"""Coordinate-wise median (Yin et al., 2018, arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence

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


@STRATEGIES.register("median")
class Median(Strategy):
    """W ← W + η_s median_k (W_k - W) in every coordinate; clients count alike, whatever their samples.

    Args:
        server_learning_rate: η_s; 1 gives the median of the clients.
    """

    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Take the middle client in every coordinate, or the mean of the two in the middle."""
        step = {name: by_coordinate(name, state, updates, _median) for name in state}
        return Aggregate(moved(state, step, self.server_learning_rate), memory)


def _median(stacked: Tensor) -> Tensor:
    ordered, number = stacked.sort(0).values, len(stacked)
    return (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
