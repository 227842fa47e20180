"""What Fed-CMP computes from client matrices, always as sums over clients.

X_k is a client's `(d_out, d_in)` matrix, w_k its weight, and G = Σ_k w_k X_k X_kᵀ = U diag(e) Uᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.lazy import Lazy
from fedcmp.federate.arithmetic.place import place
from fedcmp.federate.arithmetic.updates import Update

_DOUBLE_ROWS = 1024
_ROWS = 512
_COLUMNS = 512


@dataclass(frozen=True)
class Matrices:
    """One parameter's X_k by client: D_k = W_k - W, or W_k itself where `old` is None.

    They are made a few columns at a time, which every sum below allows: whole, they would be a
    second copy of what the clients sent. A client's own is asked for once a pass over all, as it may
    lie in a file.

    Attributes:
        new: W_k by client.
        old: W, or None.
        turned: Whether X_k are the transposes of what these say.
    """

    new: Mapping[str, Tensor]
    old: Tensor | None
    turned: bool = False

    @classmethod
    def of(cls, updates: Sequence[Update], name: str, old: Tensor | None) -> Matrices:
        """In order of client names, so that the order of arrival does not matter."""
        states = {update.client: update.state for update in updates}
        return cls(Lazy(sorted(states), lambda client: states[client][name]), old)

    @property
    def transposed(self) -> Matrices:
        """X_kᵀ by client, whose G is Σ_k w_k X_kᵀ X_k."""
        return replace(self, turned=not self.turned)

    @property
    def shape(self) -> torch.Size:
        """Shape of every X_k."""
        one = self.old if self.old is not None else self._any
        return one.T.shape if self.turned else one.shape

    @property
    def dtype(self) -> torch.dtype:
        """Above 1024 rows float64 would double time and memory, and float32 is accurate enough."""
        rows = self.shape[1 if self.turned else 0]
        return torch.float64 if rows <= _DOUBLE_ROWS else self._any.dtype

    @property
    def _any(self) -> Tensor:
        return next(iter(self.new.values()))

    def pieces(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Client, columns, and those columns of X_k; to be read only."""
        width, dtype = self.shape[1], self.dtype
        old = self.old.T if self.old is not None and self.turned else self.old
        for client, whole in self.new.items():
            new = whole.T if self.turned else whole
            for first in range(0, width, _COLUMNS):
                columns = slice(first, first + _COLUMNS)
                x = new[:, columns].to(dtype)
                yield client, columns, x if old is None else x - old[:, columns].to(dtype)

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
        gram = torch.zeros(rows, rows, dtype=self.dtype, device=place())
        blocks = [slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
        for client, _, piece in self.pieces():
            x = piece.to(gram.device)
            for block in blocks:
                gram[block, : block.stop].addmm_(x[block], x[: block.stop].T, alpha=weights[client])
        for block in blocks:
            gram[: block.start, block] = gram[block, : block.start].T
        return gram.cpu()

    def gram_times(self, weights: Mapping[str, float], right: Tensor) -> Tensor:
        """G Ω without ever forming G."""
        factor = right.to(place())
        product = torch.zeros_like(factor)
        for client, _, piece in self.pieces():
            x = piece.to(factor.device)
            product.addmm_(x, x.T @ factor, alpha=weights[client])
        return product.cpu()


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
