"""Adaptive federated optimisation (Reddi et al., 2021, arXiv 2003.00295), algorithm 2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import Aggregate, Strategy


class FedOpt(Strategy):
    """m ← β_1 m + (1 - β_1) Δ, v ← rule(v, Δ²), W ← W + η_s m / (√v + τ), with Δ = Σ_k p_k D_k.

    As in the paper there is no bias correction, and v starts at τ².

    Args:
        beta1: β_1, memory of the mean update.
        tau: τ, degree of adaptivity: the smaller, the more every coordinate moves alike.
        server_learning_rate: η_s; about how far a coordinate moves in a round.
    """

    beta1: float = Field(0.9, ge=0, lt=1)
    tau: float = Field(1e-3, gt=0)
    server_learning_rate: float = Field(0.01, gt=0)

    def begin(self, state: State, samples: Mapping[str, int]) -> Memory:
        """First moments of zero and second moments of τ²."""
        memory: Memory = {}
        for name, old in state.items():
            memory[f"m/{name}"] = torch.zeros_like(old, dtype=torch.float64)
            memory[f"v/{name}"] = torch.full_like(old, self.tau**2, dtype=torch.float64)
        return memory

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The new v from the old one and Δ²."""

    def sees(self) -> Literal["mean"]:
        """The mean update is enough."""
        return "mean"

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Take the clients' mean update for a gradient of the server's optimiser."""
        kept: Memory = {}
        step: State = {}
        for name, delta in mean_update(state, updates).items():
            m = self.beta1 * memory[f"m/{name}"] + (1 - self.beta1) * delta
            v = self.second_moment(memory[f"v/{name}"], delta.square())
            kept |= {f"m/{name}": m, f"v/{name}": v}
            step[name] = m / (v.sqrt() + self.tau)
        return Aggregate(
            moved(state, step, self.server_learning_rate), kept, {"weight": data_weights(updates)}
        )
