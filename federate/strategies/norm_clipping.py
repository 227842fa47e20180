"""Norm clipping (Sun et al., 2019, arXiv 1911.07963)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pydantic import Field

from fedcmp.federate.arithmetic.norms import norm
from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


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
        norms = {update.client: norm(state, update.state) for update in updates}
        limit, shares = self.clip * median(norms.values()), data_weights(updates)
        clip = {client: limit / each if each > limit else 1.0 for client, each in norms.items()}
        step = mean_update(state, updates, {client: shares[client] * clip[client] for client in shares})
        return Aggregate(
            moved(state, step, self.server_learning_rate), memory, {"weight": shares, "clip": clip}
        )
