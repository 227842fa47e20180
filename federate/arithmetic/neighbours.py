"""Averages over a client's nearest neighbours, by the Euclidean distance of what they send."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State


def distances(states: Mapping[str, State]) -> Tensor:
    """‖θ_k - θ_j‖ of all pairs `(K, K)` float64, in order of client names; θ is all of a state in a row."""
    names = sorted(states)
    squares = torch.zeros(len(names), len(names), dtype=torch.float64)
    for key in states[names[0]]:
        rows = torch.stack([states[name][key].flatten().double() for name in names])
        squares += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares.sqrt()


def shares_of_neighbours(apart: Tensor, samples: Tensor, neighbours: int) -> Tensor:
    """Weights `(K, K)` float64 of all clients in each client's average; rows sum to one.

    The M nearest together have their part of all their samples and the client's, split by 1 / distance; the
    client has the rest. Clients at distance 0 take all of it, in equal parts.

    Args:
        apart: Distances `(K, K)`.
        samples: Of every client `(K,)`.
        neighbours: M, at most K - 1.
    """
    count = len(apart)
    weights = torch.eye(count, dtype=torch.float64)
    chosen = min(neighbours, count - 1)
    if not chosen:
        return weights
    others = apart + torch.diag(torch.full((count,), torch.inf, dtype=torch.float64))
    for client in range(count):
        near = others[client].argsort(stable=True)[:chosen]
        away = others[client, near]
        closeness = (away == 0).double() if bool((away == 0).any()) else 1 / away
        together = samples[near].sum() / (samples[client] + samples[near].sum())
        weights[client] *= 1 - together
        weights[client, near] = together * closeness / closeness.sum()
    return weights


def mixed(states: Mapping[str, State], weights: Tensor) -> dict[str, State]:
    """Every client's weighted sum of all clients' states, in their dtype; weights are `(K, K)`."""
    names = sorted(states)
    sums: dict[str, State] = {name: {} for name in names}
    for key, first in states[names[0]].items():
        rows = torch.stack([states[name][key].flatten().double() for name in names])
        for name, row in zip(names, weights @ rows, strict=True):
            sums[name][key] = row.reshape(first.shape).to(first.dtype)
    return sums
