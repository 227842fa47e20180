"""FedAvg (McMahan et al., 2017, arXiv 1602.05629), with a server learning rate (Reddi et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from federate.strategies.base import (
    STRATEGIES,
    Aggregate,
    Memory,
    State,
    Strategy,
    Update,
    data_weights,
    weighted_sum,
)


@STRATEGIES.register("fedavg")
class FedAvg(Strategy):
    """W ← W + η_s Σ_k p_k (W_k - W)."""

    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors by number of samples."""
        weights = data_weights(updates)
        fused = {}
        for name, old in state.items():
            mean = weighted_sum({update.client: update.state[name] for update in updates}, weights)
            step = self.server_learning_rate * (mean - old.double())
            fused[name] = (old.double() + step).to(old.dtype)
        return Aggregate(fused, memory, {"weight": weights})
