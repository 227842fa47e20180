"""FedDyn (Acar et al., 2021, arXiv 2111.04263)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum

import torch
from pydantic import Field

from fedcmp.federate.arithmetic.updates import (
    Memory,
    Objective,
    State,
    Update,
    deltas,
    mean_update,
    moved,
    recall_shares,
    remember_shares,
    weighted_sum,
)
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("feddyn")
class FedDyn(Strategy):
    """Clients minimise L_k(w) - ⟨h_k, w⟩ + a / 2 · ‖w - w_t‖²; h_k tends to ∇L_k at the optimum.

    The participants S of a round change h_k ← h_k - a (W_k - W), and
    W ← Σ_{k∈S} p_k W_k / Σ_{k∈S} p_k - h / a. The paper minimises the mean of the L_k and has
    h ← h - a / N · Σ_{k∈S} (W_k - W); ours is Σ_k p_k L_k, so that p_k, client k's share of the
    samples of the whole pass, takes the place of 1 / N: h ← h - a Σ_{k∈S} p_k (W_k - W). Since h
    and all h_k start at zero, h = Σ_k p_k h_k over all clients, and is computed so.

    At a fixed point every W_k = W, hence h = 0; and W_k minimises its objective, hence
    ∇L_k(W) = h_k. Together Σ_k p_k ∇L_k(W) = 0: W is optimal.

    Args:
        alpha: a; larger values keep clients closer to the global projector.
    """

    alpha: float = Field(0.01, gt=0)

    def begin(self, state: State, samples: Mapping[str, int]) -> Memory:
        """Every client's share of the data, and h_k of zero."""
        h = {f"h/{client}/{name}": torch.zeros_like(old) for client in samples for name, old in state.items()}
        return remember_shares(samples) | h

    def objective(self, client: str, memory: Memory) -> Objective:
        """The dynamic regulariser."""
        prefix = f"h/{client}/"
        linear = {key.removeprefix(prefix): -h for key, h in memory.items() if key.startswith(prefix)}
        return Objective(self.alpha + self.proximal, linear)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors and correct the average by h."""
        shares = recall_shares(memory)
        total = fsum(shares[update.client] for update in updates)
        weights = {update.client: shares[update.client] / total for update in updates}
        kept, step = dict(memory), mean_update(state, updates, weights)
        for name, old in state.items():
            for client, delta in deltas(name, state, updates).items():
                h = memory[f"h/{client}/{name}"].double() - self.alpha * delta
                kept[f"h/{client}/{name}"] = h.to(old.dtype)
            mean = weighted_sum({client: kept[f"h/{client}/{name}"] for client in shares}, shares)
            step[name] = step[name] - mean / self.alpha
        return Aggregate(moved(state, step), kept, {"weight": weights})
