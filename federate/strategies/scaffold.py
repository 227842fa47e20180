"""SCAFFOLD (Karimireddy et al., 2020, arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedcmp.federate.arithmetic.updates import (
    Memory,
    Objective,
    State,
    Update,
    data_weights,
    mean_update,
    moved,
    recall_shares,
    remember_shares,
    weighted_sum,
)
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("scaffold")
class Scaffold(Strategy):
    """Clients follow ∇L_k(w) - c_k + c with c = Σ_k p_k c_k, and are averaged like FedAvg's.

    c_k is what client k's gradient was on average along its last local path. With plain SGD at a
    constant learning rate η_l this is the paper's option II, c_k - c + (W - W_k) / (τ_k η_l),
    because the steps add up to W - W_k = η_l Σ (g - c_k + c); taken from the gradients themselves
    it holds for any local optimiser. c sums over all clients, also those absent from a round, with
    p_k their shares of the samples of the whole pass where the paper has 1 / N.

    Args:
        server_learning_rate: η_s; 1 gives the average of the clients.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"gradient"})

    server_learning_rate: float = Field(1.0, gt=0)

    def begin(self, state: State, samples: Mapping[str, int]) -> Memory:
        """Every client's share of the data, and controls of zero."""
        controls = {
            f"control/{client}/{name}": torch.zeros_like(old)
            for client in samples
            for name, old in state.items()
        }
        return remember_shares(samples) | controls

    def objective(self, client: str, memory: Memory) -> Objective:
        """A linear term whose gradient is c - c_k."""
        shares = recall_shares(memory)
        prefix = f"control/{client}/"
        linear: State = {}
        for key, own in memory.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                mean = weighted_sum({each: memory[f"control/{each}/{name}"] for each in shares}, shares)
                linear[name] = (mean - own.double()).to(own.dtype)
        return Objective(self.proximal, linear)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors and replace the participants' controls.

        Raises:
            ValueError: Naming a client that sent no gradient.
        """
        kept = dict(memory)
        for update in updates:
            if update.gradient is None:
                raise ValueError(f"client '{update.client}' sent no gradient")
            kept |= {f"control/{update.client}/{name}": update.gradient[name].clone() for name in state}
        return Aggregate(
            moved(state, mean_update(state, updates), self.server_learning_rate),
            kept,
            {"weight": data_weights(updates)},
        )
