"""What Fed-CMP computes from client matrices, always as sums over clients.

X_k is a client's `(d_out, d_in)` matrix, w_k its weight, and G = Σ_k w_k X_k X_kᵀ = U diag(e) Uᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federate.strategies.base import Update

_DOUBLE_ROWS = 1024
_BLOCK = 512
_POWER_PASSES = 1


@dataclass(frozen=True)
class Matrices:
    """One parameter's X_k by client: D_k = W_k - W, or W_k itself where `old` is None.

    Each is made when it is its turn, because all of them together would be a second copy of what
    the clients sent. They are read only: X_k may be the client's own tensor.
    """

    new: Mapping[str, Tensor]
    old: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, updates: Sequence[Update], name: str, old: Tensor | None) -> Matrices:
        """In order of client names, so that the order of arrival does not matter.

        Above 1024 rows float64 would double time and memory, and float32 is accurate enough.
        """
        new = {u.client: u.state[name] for u in sorted(updates, key=lambda update: update.client)}
        first = next(iter(new.values()))
        dtype = torch.float64 if len(first) <= _DOUBLE_ROWS else first.dtype
        return cls(new, None if old is None else old.to(dtype), dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for client, new in self.new.items():
            yield client, new.to(self.dtype) if self.old is None else new.to(self.dtype) - self.old

    def _zeros(self, columns: int | None = None) -> Tensor:
        first = next(iter(self.new.values()))
        return torch.zeros(len(first), columns or first.shape[1], dtype=self.dtype)

    def sum(self, weights: Mapping[str, float]) -> Tensor:
        """Σ_k w_k X_k."""
        total = self._zeros()
        for client, x in self:
            total.add_(x, alpha=weights[client])
        return total

    def trace(self, weights: Mapping[str, float]) -> float:
        """Trace of G."""
        return sum(weights[client] * inner(x, x) for client, x in self)

    def gram(self, weights: Mapping[str, float]) -> Tensor:
        """G; only blocks on and below the diagonal are computed, which halves the work."""
        rows = len(next(iter(self.new.values())))
        gram = self._zeros(rows)
        blocks = [slice(first, min(first + _BLOCK, rows)) for first in range(0, rows, _BLOCK)]
        for client, x in self:
            for block in blocks:
                gram[block, : block.stop].addmm_(x[block], x[: block.stop].T, alpha=weights[client])
        for block in blocks:
            gram[: block.start, block] = gram[block, : block.start].T
        return gram

    def gram_times(self, weights: Mapping[str, float], right: Tensor) -> Tensor:
        """G Ω without ever forming G."""
        product = torch.zeros_like(right)
        for client, x in self:
            product.addmm_(x, x.T @ right, alpha=weights[client])
        return product


def inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩; rows are added up in float64, as float32 would lose digits over millions of entries."""
    return float(torch.linalg.vecdot(a, b).double().sum())


def agreement(matrices: Matrices, shares: Mapping[str, float]) -> dict[str, float]:
    """c_k: cosine of X_k with the consensus Σ_{j≠k} p_j X_j of the others; 1 where there is none."""
    if len(matrices.new) == 1:
        return dict.fromkeys(matrices.new, 1.0)
    total = matrices.sum(shares)
    cosines = {}
    for client, x in matrices:
        # Multiplied first: a fused multiply-subtract leaves rounding noise where the others did not move.
        others = total - shares[client] * x
        norms = (inner(x, x) * inner(others, others)) ** 0.5
        cosines[client] = inner(x, others) / norms if norms > 0 else 0.0
    return cosines


def agreement_by_direction(matrices: Matrices, shares: Mapping[str, float], basis: Tensor) -> Tensor:
    """c_{k,i}: the same for every row of Uᵀ X_k, `(clients, r)` float64."""
    if len(matrices.new) == 1:
        return torch.ones(1, basis.shape[1], dtype=torch.float64)
    total = basis.T @ matrices.sum(shares)
    cosines = []
    for client, x in matrices:
        rows = basis.T @ x
        others = total - shares[client] * rows
        norms = (rows.norm(dim=1) * others.norm(dim=1)).double()
        cosine = torch.linalg.vecdot(rows, others).double() / norms
        cosines.append(torch.where(norms > 0, cosine, 0.0))
    return torch.stack(cosines)


def fuse_by_direction(matrices: Matrices, weights: Tensor, basis: Tensor) -> Tensor:
    """Rows Σ_k w_{k,i} u_iᵀ X_k; weights are `(clients, r)`."""
    fused = torch.zeros_like(basis.T @ next(iter(matrices))[1])
    for row, (_, x) in zip(weights.to(matrices.dtype), matrices, strict=True):
        fused += row[:, None] * (basis.T @ x)
    return fused


def leading(values: Tensor, rank: int | None, energy: float, trace: float) -> int:
    """How many of the eigenvalues, largest first, `rank` and `energy` ask for."""
    size = len(values) if rank is None else min(len(values), rank)
    if energy < 1:
        size = min(size, 1 + int((values.cumsum(0) < energy * trace).sum()))
    return size


def canonical_basis(gram: Tensor, rank: int | None = None, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of G, largest first.

    Args:
        gram: `(d_out, d_out)`, symmetric positive semidefinite.
        rank: Number of directions at most.
        energy: Share of the trace they must hold.

    Returns:
        U `(d_out, r)` with orthonormal columns, and e `(r,)`.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0).clamp_(min=0)
    size = leading(values, rank, energy, float(values.sum()))
    return vectors[:, len(values) - size :].flip(1), values[:size]


def randomised_basis(times: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of G from its products alone (Halko et al., 2011, arXiv 0909.4061).

    Args:
        times: X ↦ G X.
        start: Random `(d_out, r)`; more columns than the directions wanted.

    Returns:
        U `(d_out, r)` with orthonormal columns, and e `(r,)`, largest first.
    """
    basis = torch.linalg.qr(times(start)).Q
    for _ in range(_POWER_PASSES):
        basis = torch.linalg.qr(times(basis)).Q
    small = basis.T @ times(basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return basis @ vectors.flip(1), values.flip(0).clamp(min=0)


def polar(matrix: Tensor) -> Tensor:
    """The (partial) isometry nearest to a matrix."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
