"""PivotMerge (arXiv 2604.22823), our reading: only the paper's abstract was available to us.

Notation of docs/merging.md: D_k = W_k - W client k's update of one weight matrix, p_k its share of
the samples, g_k what the layer contributes to its alignment, f the floor, U the canonical basis and
c_ki = u_iᵀ D_k the coefficients of client k in canonical direction i:

    a_k = p_k max(g_k, f) / Σ_j p_j max(g_j, f)        weights of the layer
    U = eigenvectors of Σ_k a_k D_k D_kᵀ
    m_i = Σ_k a_k c_ki                                 consensus
    s_i = ‖m_i‖ / Σ_k a_k ‖c_ki‖                       agreement, in [0, 1]
    S_i = {k : ⟨c_ki, m_i⟩ ≥ 0}                        clients that are not against it
    r_i = Σ_{k∈S_i} a_k c_ki / Σ_{k∈S_i} a_k           disjoint mean, as in TIES
    r_i = h_i + o_i, h_i along m_i                     shared and domain-specific part
    W ← W + λ Σ_i u_i (h_i + s_i^q o_i)ᵀ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.arithmetic.bases import canonical_basis
from fedcmp.federate.arithmetic.updates import (
    Measure,
    Memory,
    State,
    Update,
    data_weights,
    deltas,
    moved,
    weighted_sum,
)
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy

_CANCELLED = 1e-3
_ROUNDING = 1e-9


@STRATEGIES.register("pivotmerge")
class PivotMerge(Strategy):
    """Shared-space decomposition and filtering, with alignment-guided layer-wise weights.

    Without alignments every layer is weighted by samples alone.

    Args:
        measure: What a layer contributes: the rise of the frozen LLM's loss without its training, in nats a
            token (`likelihood`), or the fall of CKA (`cka`).
        floor: Least contribution to the alignment a client is taken to have (f), in units of the measure;
            what is below is beyond what some hundred samples can tell from zero.
        specific: Exponent q by which agreement damps domain-specific parts; 0 keeps them whole.
        energy: Share of the updates' energy that the canonical directions must hold; what lies
            outside them is dropped.
        scale: λ; 1 gives a single client itself.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"alignment"})

    measure: Measure = "likelihood"
    floor: float = Field(1e-3, gt=0)
    specific: float = Field(1.0, ge=0)
    energy: float = Field(1.0, gt=0, le=1)
    scale: float = Field(1.0, gt=0)

    def aligned_by(self) -> Measure:
        """As its option says."""
        return self.measure

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Fuse matrices in their canonical space; biases take the weights of their layer."""
        matrices = [name for name, old in state.items() if old.ndim == 2]
        weights = {name: layer_weights(name, updates, self.floor) for name in matrices}
        mean = data_weights(updates)
        if weights:
            mean = {client: fmean(layer[client] for layer in weights.values()) for client in mean}
        step: State = {}
        for name in state:
            updated = deltas(name, state, updates)
            if name in weights:
                step[name] = filtered(updated, weights[name], specific=self.specific, energy=self.energy)
            else:
                layer = f"{name.rpartition('.')[0]}.weight"
                step[name] = weighted_sum(updated, weights.get(layer, mean))
        return Aggregate(moved(state, step, self.scale), memory, {"weight": mean})


def layer_weights(matrix: str, updates: Sequence[Update], floor: float) -> dict[str, float]:
    """a_k of one layer; the data shares where a client does not say what its layer contributes."""
    contributions = {
        update.client: update.alignment[matrix]
        for update in updates
        if update.alignment is not None and matrix in update.alignment
    }
    shares = data_weights(updates)
    if len(contributions) < len(shares):
        return shares
    raw = {client: shares[client] * max(contributions[client], floor) for client in shares}
    total = sum(raw[client] for client in sorted(raw))
    return {client: weight / total for client, weight in raw.items()}


def filtered(
    updates: Mapping[str, Tensor], weights: Mapping[str, float], *, specific: float, energy: float
) -> Tensor:
    """Σ_i u_i (h_i + s_i^q o_i)ᵀ of one matrix.

    Args:
        updates: D_k by client, `(d_out, d_in)` float64, in order of client names.
        weights: a_k.
        specific: q.
        energy: Share of the energy in the canonical directions kept.
    """
    gram = weighted_sum({client: update @ update.T for client, update in updates.items()}, weights)
    basis, _ = canonical_basis(gram, energy=energy)
    rows = {client: basis.T @ update for client, update in updates.items()}
    consensus = basis.T @ weighted_sum(updates, weights)
    length = consensus.norm(dim=1)
    spread = weighted_sum({client: c.norm(dim=1) for client, c in rows.items()}, weights)
    agreement = _divided(length, spread).clamp(max=1)
    # Below this the clients have cancelled and the sign of what is left is that of rounding.
    agreed = agreement > _CANCELLED
    direction = _divided(consensus, length[:, None]) * agreed[:, None]
    # A client that did not move along m_i is not against it, whatever the sign of its rounding.
    kept = {
        client: (agreed & ((c * direction).sum(1) >= -_ROUNDING * length)).double()
        for client, c in rows.items()
    }
    total = weighted_sum(kept, weights)
    mean = weighted_sum({client: kept[client][:, None] * c for client, c in rows.items()}, weights)
    mean = _divided(mean, total[:, None])
    shared = (mean * direction).sum(1, keepdim=True) * direction
    return basis @ (shared + (agreement**specific)[:, None] * (mean - shared))


def _divided(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
