"""FedAvg (McMahan et al., 2017, arXiv 1602.05629), with a server learning rate (Reddi et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("fedavg")
class FedAvg(Strategy):
    """W ← W + η_s Σ_k p_k (W_k - W).

    Args:
        server_learning_rate: η_s; 1 gives the average of the clients.
    """

    server_learning_rate: float = Field(1.0, gt=0)

    def sees(self) -> Literal["mean"]:
        """The mean update is enough."""
        return "mean"

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors by number of samples."""
        step = mean_update(state, updates)
        return Aggregate(
            moved(state, step, self.server_learning_rate), memory, {"weight": data_weights(updates)}
        )
