"""Directions that clients' matrices share, and what is fused along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import scipy.linalg
import torch
from torch import Tensor

from fedcmp.federate.arithmetic.matrices import Matrices
from fedcmp.federate.arithmetic.place import place


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
    values, vectors = eigenpairs(gram.to(torch.float64, copy=True), place())
    values = values.flip(0).clamp_(min=0)
    size = leading(values, rank, energy, float(values.sum()))
    return vectors[:, len(values) - size :].to(gram.dtype).flip(1), values[:size].to(gram.dtype)


def eigenpairs(square: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, smallest first, and its eigenvectors, computed on a device.

    The matrix may be overwritten.
    """
    if device.type == "cpu":
        # SciPy's LAPACK takes three quarters of the time of the one in torch's wheels.
        found = scipy.linalg.eigh(square.numpy(), driver="evd", overwrite_a=True, check_finite=False)
        values, vectors = (torch.from_numpy(each) for each in found)
        return values, vectors
    values, vectors = torch.linalg.eigh(square.to(device))
    return values.cpu(), vectors.cpu()


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
