"""What Fed-CMP computes from client matrices, always as sums over clients.

X_k is a client's `(d_out, d_in)` matrix, w_k its weight, and G = Σ_k w_k X_k X_kᵀ = U diag(e) Uᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from fedcmp.federate.strategies.base import Update

_DOUBLE_ROWS = 1024
_ROWS = 512
_COLUMNS = 512


@dataclass(frozen=True)
class Matrices:
    """One parameter's X_k by client: D_k = W_k - W, or W_k itself where `old` is None.

    They are made a few columns at a time, which every sum below allows: whole, they would be a
    second copy of what the clients sent.
    """

    new: Mapping[str, Tensor]
    old: Tensor | None

    @classmethod
    def of(cls, updates: Sequence[Update], name: str, old: Tensor | None) -> Matrices:
        """In order of client names, so that the order of arrival does not matter."""
        return cls({u.client: u.state[name] for u in sorted(updates, key=lambda u: u.client)}, old)

    @property
    def shape(self) -> torch.Size:
        """Shape of every X_k."""
        return next(iter(self.new.values())).shape

    @property
    def dtype(self) -> torch.dtype:
        """Above 1024 rows float64 would double time and memory, and float32 is accurate enough."""
        return torch.float64 if self.shape[0] <= _DOUBLE_ROWS else next(iter(self.new.values())).dtype

    def pieces(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Client, columns, and those columns of X_k; to be read only."""
        for client, new in self.new.items():
            for first in range(0, self.shape[1], _COLUMNS):
                columns = slice(first, first + _COLUMNS)
                x = new[:, columns].to(self.dtype)
                yield client, columns, x if self.old is None else x - self.old[:, columns].to(self.dtype)

    def sum(self, weights: Mapping[str, float]) -> Tensor:
        """Σ_k w_k X_k."""
        total = torch.zeros(self.shape, dtype=self.dtype)
        for client, columns, x in self.pieces():
            total[:, columns].add_(x, alpha=weights[client])
        return total

    def trace(self, weights: Mapping[str, float]) -> float:
        """Trace of G."""
        return sum(weights[client] * inner(x, x) for client, _, x in self.pieces())

    def gram(self, weights: Mapping[str, float]) -> Tensor:
        """G; only blocks on and below the diagonal are computed, which halves the work."""
        rows = self.shape[0]
        gram = torch.zeros(rows, rows, dtype=self.dtype)
        blocks = [slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
        for client, _, x in self.pieces():
            for block in blocks:
                gram[block, : block.stop].addmm_(x[block], x[: block.stop].T, alpha=weights[client])
        for block in blocks:
            gram[: block.start, block] = gram[block, : block.start].T
        return gram

    def gram_times(self, weights: Mapping[str, float], right: Tensor) -> Tensor:
        """G Ω without ever forming G."""
        product = torch.zeros_like(right)
        for client, _, x in self.pieces():
            product.addmm_(x, x.T @ right, alpha=weights[client])
        return product


def inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩; rows are added up in float64, as float32 would lose digits over millions of entries."""
    return float(torch.linalg.vecdot(a, b).double().sum())


def agreement(matrices: Matrices, shares: Mapping[str, float]) -> dict[str, float]:
    """c_k: cosine of X_k with the consensus Σ_{j≠k} p_j X_j of the others; 1 where there is none."""
    if len(matrices.new) == 1:
        return dict.fromkeys(matrices.new, 1.0)
    return agreement_with(matrices.sum(shares), matrices, shares)


def agreement_with(total: Tensor, matrices: Matrices, shares: Mapping[str, float]) -> dict[str, float]:
    """c_k of some clients, given Σ_j p_j X_j of all: what a client can compute for itself."""
    products = {client: (0.0, 0.0, 0.0) for client in matrices.new}
    for client, columns, x in matrices.pieces():
        # Multiplied first: a fused multiply-subtract leaves rounding noise where the others did not move.
        others = total[:, columns] - shares[client] * x
        both, own, rest = products[client]
        products[client] = (both + inner(x, others), own + inner(x, x), rest + inner(others, others))
    return {
        client: both / (own * rest) ** 0.5 if own * rest > 0 else 0.0
        for client, (both, own, rest) in products.items()
    }


def agreement_by_direction(matrices: Matrices, shares: Mapping[str, float], basis: Tensor) -> Tensor:
    """c_{k,i}: the same for every row of Uᵀ X_k, `(clients, r)` float64."""
    if len(matrices.new) == 1:
        return torch.ones(1, basis.shape[1], dtype=torch.float64)
    total = basis.T @ matrices.sum(shares)
    products = {client: torch.zeros(3, basis.shape[1], dtype=torch.float64) for client in matrices.new}
    for client, columns, x in matrices.pieces():
        rows = basis.T @ x
        others = total[:, columns] - shares[client] * rows
        for product, (a, b) in zip(
            products[client], ((rows, others), (rows, rows), (others, others)), strict=True
        ):
            product += torch.linalg.vecdot(a, b)
    both, own, rest = torch.stack(list(products.values())).unbind(1)
    return torch.where(own * rest > 0, both / (own * rest).sqrt(), 0.0)


def fuse_by_direction(matrices: Matrices, weights: Tensor, basis: Tensor) -> Tensor:
    """Rows Σ_k w_{k,i} u_iᵀ X_k; weights are `(clients, r)`."""
    fused = torch.zeros(basis.shape[1], matrices.shape[1], dtype=matrices.dtype)
    of = dict(zip(matrices.new, weights.to(matrices.dtype), strict=True))
    for client, columns, x in matrices.pieces():
        fused[:, columns] += of[client][:, None] * (basis.T @ x)
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
    # In float32 the error, relative to e_1, is that of the smallest values that equalisation tells apart.
    # SciPy's LAPACK takes three quarters of the time of the one in torch's wheels.
    square = gram.to(torch.float64, copy=True).numpy()
    found = scipy.linalg.eigh(square, driver="evd", overwrite_a=True, check_finite=False)
    values, vectors = (torch.from_numpy(each) for each in found)
    values = values.flip(0).clamp_(min=0)
    size = leading(values, rank, energy, float(values.sum()))
    return vectors[:, len(values) - size :].to(gram.dtype).flip(1), values[:size].to(gram.dtype)


def randomised_basis(times: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of G's Nyström approximation Y (Qᵀ Y)⁺ Yᵀ, where Q = qr(G Ω) and Y = G Q.

    Two products with G give the range of a power pass, and eigenvalues that never exceed G's
    (Halko et al., 2011, arXiv 0909.4061, section 5.5).

    Args:
        times: X ↦ G X.
        start: Random Ω `(d_out, r)`; more columns than the directions wanted.

    Returns:
        U `(d_out, r)` with orthonormal columns, and e `(r,)`, largest first.
    """
    basis = torch.linalg.qr(times(start)).Q
    image = times(basis)
    small = basis.T @ image
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    noise = len(image) * torch.finfo(image.dtype).eps * values[-1]
    scale = torch.where(values > noise, values.clamp(min=noise).rsqrt(), 0.0)
    u, roots, _ = torch.linalg.svd(image @ (vectors * scale), full_matrices=False)
    return u, roots.square()


def polar(matrix: Tensor) -> Tensor:
    """The (partial) isometry nearest to a matrix."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
