"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) as the server's optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("muon")
class Muon(Strategy):
    """m ← β m + Σ_k p_k D_k, W ← W + η_s U Vᵀ ‖m‖ / ‖U Vᵀ‖ of every matrix, with m = U S Vᵀ.

    All directions of the momentum move alike. Muon's step has a fixed length, here it has the
    momentum's, so that η_s = 1 suits as it does FedAvgM. Muon iterates towards U Vᵀ, here it is
    exact; its Nesterov momentum is left out. Biases move by m itself.

    Args:
        momentum: β.
        server_learning_rate: η_s.
    """

    momentum: float = Field(0.3, ge=0, lt=1)
    server_learning_rate: float = Field(1.0, gt=0)

    def sees(self) -> Literal["mean"]:
        """The mean update is enough."""
        return "mean"

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average client projectors, then orthogonalise the server's momentum."""
        momentum = {
            name: self.momentum * memory.get(f"momentum/{name}", torch.tensor(0.0)) + delta
            for name, delta in mean_update(state, updates).items()
        }
        step = {name: orthogonalised(m) if m.ndim == 2 else m for name, m in momentum.items()}
        return Aggregate(
            moved(state, step, self.server_learning_rate),
            {f"momentum/{name}": m for name, m in momentum.items()},
            {"weight": data_weights(updates)},
        )


def orthogonalised(matrix: Tensor) -> Tensor:
    """U Vᵀ of the matrix U S Vᵀ, rescaled to its Frobenius norm.

    Directions the matrix does not have are left out: their singular vectors are rounding noise.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s >= s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum())
    return u[:, :rank] @ vt[:rank] * (s.norm() / rank**0.5)
