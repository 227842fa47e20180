"""Task arithmetic (Ilharco et al., 2023, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedcmp.federate.arithmetic.updates import Memory, State, Update, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("task_arithmetic")
class TaskArithmetic(Strategy):
    """W ← W + λ Σ_k (W_k - W): updates as task vectors, added without weights.

    Args:
        scale: λ, which the paper tunes on held-out data; 1 / K gives the unweighted average.
    """

    scale: float = Field(0.3, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Add all clients' updates."""
        ones = {update.client: 1.0 for update in updates}
        return Aggregate(moved(state, mean_update(state, updates, ones), self.scale), memory)
