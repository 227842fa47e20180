"""FedAvgM (Hsu et al., 2019, arXiv 1909.06335)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("fedavgm")
class FedAvgM(Strategy):
    """m ← β m + Σ_k p_k (W_k - W), W ← W + η_s m.

    Args:
        momentum: β. A steady update is in the end taken 1 / (1 - β) times.
        server_learning_rate: η_s.
    """

    momentum: float = Field(0.9, ge=0, lt=1)
    server_learning_rate: float = Field(1.0, gt=0)

    def sees(self) -> Literal["mean"]:
        """The mean update is enough."""
        return "mean"

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors and carry the server's momentum on."""
        step = {
            name: self.momentum * memory.get(f"momentum/{name}", torch.tensor(0.0)) + delta
            for name, delta in mean_update(state, updates).items()
        }
        return Aggregate(
            moved(state, step, self.server_learning_rate),
            {f"momentum/{name}": m for name, m in step.items()},
            {"weight": data_weights(updates)},
        )
