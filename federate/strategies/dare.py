"""DARE (Yu et al., 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from pydantic import Field

from fedcmp.federate.arithmetic.updates import (
    Memory,
    State,
    Update,
    data_weights,
    deltas,
    moved,
)
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("dare")
class Dare(Strategy):
    """W ← W + η_s Σ_k p_k B_k ⊙ D_k / (1 - q) with B_k random, 0 at rate q and 1 otherwise.

    In expectation the step is FedAvg's. B_k depends on seed, client and round alone.

    Args:
        drop: q, share of every update to drop.
        seed: Where the randomness comes from.
        server_learning_rate: η_s.
    """

    drop: float = Field(0.5, ge=0, lt=1)
    server_learning_rate: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average what is left of the updates."""
        rounds = int(memory.get("rounds", torch.tensor(0)))
        shares = data_weights(updates)
        generators = {client: self._generator(client, rounds) for client in shares}
        step: State = {}
        for name in sorted(state):
            step[name] = torch.zeros(state[name].shape, dtype=torch.float64)
            for client, delta in deltas(name, state, updates).items():
                kept = torch.rand(delta.shape, generator=generators[client]) >= self.drop
                step[name].add_(delta * kept / (1 - self.drop), alpha=shares[client])
        fused = moved(state, step, self.server_learning_rate)
        return Aggregate(fused, {"rounds": torch.tensor(rounds + 1)}, {"weight": shares})

    def _generator(self, client: str, round_: int) -> torch.Generator:
        digest = sha256(f"{self.seed}/{round_}/{client}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]))
