"""Norm clipping (Sun et al., 2019, arXiv 1911.07963)."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from statistics import median

from pydantic import Field

from federate.strategies.base import (
    STRATEGIES,
    Aggregate,
    Memory,
    State,
    Strategy,
    Update,
    data_weights,
    deltas,
    mean_update,
    moved,
)


@STRATEGIES.register("norm_clipping")
class NormClipping(Strategy):
    """W ← W + η_s Σ_k p_k D_k min(1, M / ‖D_k‖), norms over all parameters together.

    The paper's M is a constant; ours is relative to the round, since updates shrink over a pass.

    Args:
        clip: M as a multiple of the round's median norm.
        server_learning_rate: η_s.
    """

    clip: float = Field(1.0, gt=0)
    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average updates of which none is much longer than the usual one."""
        squares: dict[str, list[float]] = {update.client: [] for update in updates}
        for name in state:
            for client, delta in deltas(name, state, updates).items():
                squares[client].append(float(delta.square().sum()))
        norms = {client: sqrt(fsum(each)) for client, each in squares.items()}
        limit = self.clip * median(norms.values())
        factors = {client: limit / norm if norm > limit else 1.0 for client, norm in norms.items()}
        shares = data_weights(updates)
        step = mean_update(state, updates, {client: shares[client] * factors[client] for client in shares})
        return Aggregate(
            moved(state, step, self.server_learning_rate), memory, {"weight": shares, "clip": factors}
        )
