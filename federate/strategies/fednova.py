"""FedNova (Wang et al., 2020, arXiv 2007.07481)."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from pydantic import Field

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("fednova")
class FedNova(Strategy):
    """W ← W + η_s τ_eff Σ_k p_k D_k / τ_k, with τ_eff = Σ_k p_k τ_k and τ_k client k's local steps.

    Clients that take more steps then no longer pull the optimum towards theirs. τ_k is the paper's
    ‖a_k‖₁ of plain SGD with a constant learning rate.

    Args:
        server_learning_rate: η_s.
    """

    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average updates a step, then go as many steps as the clients did on average."""
        shares = data_weights(updates)
        per_step = {update.client: shares[update.client] / update.steps for update in updates}
        effective = fsum(shares[update.client] * update.steps for update in updates)
        step = mean_update(state, updates, per_step)
        total = fsum(per_step.values())
        return Aggregate(
            moved(state, step, self.server_learning_rate * effective),
            memory,
            {"weight": {client: weight / total for client, weight in per_step.items()}},
        )
