"""KnOTS (Stoica et al., 2024, arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.arithmetic.updates import (
    Memory,
    State,
    Update,
    data_weights,
    deltas,
    moved,
    weighted_sum,
)
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy, ties


@STRATEGIES.register("knots")
class Knots(Strategy):
    """W ← W + λ U merge(S V_1ᵀ, ..., S V_Kᵀ), with [D_1 ... D_K] = U S [V_1ᵀ ... V_Kᵀ] of every matrix.

    In the basis U that they share, the clients' coordinates mean the same. `merge` is an inner rule;
    biases go into it as they are.

    Args:
        inner: `ties` is the paper's KnOTS-TIES, which trims over all parameters together; `mean`
            weighs by samples and is FedAvg, since U (Σ_k p_k S V_kᵀ) = Σ_k p_k D_k.
        density: Share of the coordinates that the trimming of `ties` keeps.
        scale: λ.
    """

    inner: Literal["mean", "ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1)
    scale: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Merge matrices in the basis the clients share."""
        shares = data_weights(updates)
        clients: dict[str, State] = {client: {} for client in sorted(shares)}
        bases: State = {}
        for name, old in state.items():
            blocks = deltas(name, state, updates)
            if old.ndim == 2:
                bases[name], blocks = aligned(blocks)
            for client, block in blocks.items():
                clients[client][name] = block
        if self.inner == "mean":
            each = {name: {client: clients[client][name] for client in clients} for name in state}
            step = {name: weighted_sum(blocks, shares) for name, blocks in each.items()}
        else:
            step = ties.merged(list(clients.values()), self.density)
        step |= {name: basis @ step[name] for name, basis in bases.items()}
        return Aggregate(moved(state, step, self.scale), memory)


def aligned(updates: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """U, and S V_kᵀ by client.

    Directions no client has are left out, lest their zeros count as coordinates in trimming.
    """
    joint = torch.cat(list(updates.values()), dim=1)
    u, s, vt = torch.linalg.svd(joint, full_matrices=False)
    rank = int((s >= s[0] * max(joint.shape) * torch.finfo(s.dtype).eps).sum())
    blocks = (s[:rank, None] * vt[:rank]).tensor_split(len(updates), dim=1)
    return u[:, :rank], dict(zip(updates, blocks, strict=True))
