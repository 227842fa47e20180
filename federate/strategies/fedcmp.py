"""Fed-CMP (arXiv 2603.26786), our reading: only the paper's abstract was available to us.

Notation of docs/fed_cmp.md: W the global matrix, D_k = W_k - W client k's update, p_k its share of
the samples, U and e the eigenpairs of G = Σ_k p_k D_k D_kᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

import torch
from pydantic import Field
from torch import Tensor

from federate.strategies.base import (
    STRATEGIES,
    Aggregate,
    Memory,
    State,
    Strategy,
    Update,
    data_weights,
    weighted_sum,
)

_FLOOR = 0.02
_SMOOTHING = 0.6
_SPECTRUM_FLOOR = 1e-3


@STRATEGIES.register("fedcmp")
class FedCmp(Strategy):
    """Canonical reliability-aware aggregation with orthogonality-preserved momentum.

    Args:
        reliability: Weight clients by their agreement with the others' consensus.
        kappa: Share of the median agreement that earns full weight (κ).
        consensus: Median agreement below which there is no consensus to judge by, as when training
            has converged and updates are noise; clients then keep their last reliability.
        warmup: First rounds in which reliability is off, so that rare honest silos are not
            punished before a consensus exists.
        equalise: Exponent of the spectral equalisation (a); 0 leaves the spectrum as it is.
        rank: Directions in the canonical basis; all by default.
        energy: Share of the energy that the basis must hold; with `rank`, the smaller basis.
        basis_momentum: Memory of G (b).
        momentum: Memory of the update within the basis (β).
        server_learning_rate: η_s.
    """

    reliability: bool = True
    kappa: float = Field(0.3, gt=0)
    consensus: float = Field(0.03, gt=0, lt=1)
    warmup: int = Field(1, ge=0)
    equalise: float = Field(1.0, ge=0)
    rank: int | None = Field(None, ge=1)
    energy: float = Field(1.0, gt=0, le=1)
    basis_momentum: float = Field(0.6, ge=0, lt=1)
    momentum: float = Field(0.3, ge=0, lt=1)
    server_learning_rate: float = Field(1.5, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Fuse matrices in their canonical space; biases take the matrices' mean weights."""
        shares = data_weights(updates)
        rounds = int(memory.get("rounds", torch.tensor(0)))
        kept: Memory = {"rounds": torch.tensor(rounds + 1)}
        fused: State = {}
        reliabilities: dict[str, list[float]] = {client: [] for client in shares}
        deltas = {
            name: {update.client: update.state[name].double() - old.double() for update in updates}
            for name, old in state.items()
        }
        for name in (name for name, old in state.items() if old.ndim == 2):
            cosines = _smooth(agreement(deltas[name], shares), _recall(memory, f"cosine/{name}/"))
            r = _recall(memory, f"reliability/{name}/")
            r = {client: r.get(client, 1.0) for client in shares}
            if self.reliability and rounds >= self.warmup and median(cosines.values()) >= self.consensus:
                r = self._reliability(cosines)
            for client in shares:
                kept[f"cosine/{name}/{client}"] = torch.tensor(cosines[client], dtype=torch.float64)
                kept[f"reliability/{name}/{client}"] = torch.tensor(r[client], dtype=torch.float64)
                reliabilities[client].append(r[client])
            mean = weighted_sum(deltas[name], _reweigh(shares, r))
            gram = self._gram(deltas[name], shares, memory.get(f"gram/{name}"))
            basis, spectrum = canonical_basis(gram, self.rank, self.energy)
            step = mean + basis @ self._interference(basis.T @ mean, spectrum)
            if f"momentum/{name}" in memory:
                transported = basis @ (basis.T @ memory[f"momentum/{name}"])
                step = step + self.momentum * transported
            kept |= {f"gram/{name}": gram, f"momentum/{name}": step}
            fused[name] = self._stepped(state[name], step)
        r = {client: fmean(values) if values else 1.0 for client, values in reliabilities.items()}
        weights = _reweigh(shares, r)
        for name in (name for name, old in state.items() if old.ndim != 2):
            step = weighted_sum(deltas[name], weights)
            if f"momentum/{name}" in memory:
                step = step + self.momentum * memory[f"momentum/{name}"]
            kept[f"momentum/{name}"] = step
            fused[name] = self._stepped(state[name], step)
        return Aggregate({name: fused[name] for name in state}, kept, {"reliability": r, "weight": weights})

    def _reliability(self, cosines: dict[str, float]) -> dict[str, float]:
        """r_k: full for whoever agrees at least κ times as well as the median client."""
        enough = self.kappa * median(cosines.values())
        return {client: min(max(c / enough, _FLOOR), 1.0) for client, c in cosines.items()}

    def _gram(self, deltas: dict[str, Tensor], shares: dict[str, float], old: Tensor | None) -> Tensor:
        gram = weighted_sum({client: delta @ delta.T for client, delta in deltas.items()}, shares)
        trace = gram.trace()
        normalised = gram / trace if trace > 0 else gram
        if old is None:
            return normalised
        return self.basis_momentum * old + (1 - self.basis_momentum) * normalised

    def _interference(self, coefficients: Tensor, spectrum: Tensor) -> Tensor:
        """What equalisation adds to the coefficients C = Uᵀ Σ ω_k D_k, keeping their norm."""
        norm = coefficients.norm()
        if self.equalise == 0 or norm == 0:
            return torch.zeros_like(coefficients)
        gains = (spectrum / spectrum[0] + _SPECTRUM_FLOOR) ** (-self.equalise / 2)
        equalised = gains[:, None] * coefficients
        return equalised * (norm / equalised.norm()) - coefficients

    def _stepped(self, old: Tensor, step: Tensor) -> Tensor:
        return (old.double() + self.server_learning_rate * step).to(old.dtype)


def agreement(deltas: dict[str, Tensor], shares: dict[str, float]) -> dict[str, float]:
    """c_k: cosine of D_k with the consensus Σ_{j≠k} p_j D_j of the others; 1 where there is none."""
    if len(deltas) == 1:
        return dict.fromkeys(deltas, 1.0)
    total = weighted_sum(deltas, shares)
    cosines = {}
    for client, delta in deltas.items():
        others = total - shares[client] * delta
        norms = delta.norm() * others.norm()
        cosines[client] = float((delta * others).sum() / norms) if norms > 0 else 0.0
    return cosines


def canonical_basis(gram: Tensor, rank: int | None = None, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of G, largest first.

    Args:
        gram: `(d_out, d_out)` float64, symmetric positive semidefinite.
        rank: Number of directions at most.
        energy: Share of the trace they must hold.

    Returns:
        U `(d_out, r)` with orthonormal columns, and e `(r,)`.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    size = len(values)
    if energy < 1:
        size = min(size, 1 + int((values.cumsum(0) < energy * values.sum()).sum()))
    if rank is not None:
        size = min(size, rank)
    return vectors[:, :size], values[:size]


def _recall(memory: Memory, prefix: str) -> dict[str, float]:
    """Figures by client that the last round left in memory."""
    return {key.removeprefix(prefix): float(c) for key, c in memory.items() if key.startswith(prefix)}


def _smooth(cosines: dict[str, float], old: dict[str, float]) -> dict[str, float]:
    """Average with the last round's cosines where the same clients took part."""
    if old.keys() != cosines.keys():
        return cosines
    return {client: _SMOOTHING * old[client] + (1 - _SMOOTHING) * c for client, c in cosines.items()}


def _reweigh(shares: dict[str, float], reliability: dict[str, float]) -> dict[str, float]:
    """ω_k = p_k r_k / Σ_j p_j r_j."""
    total = sum(shares[client] * reliability[client] for client in sorted(shares))
    return {client: shares[client] * reliability[client] / total for client in shares}
