"""TIES-Merging (Yadav et al., 2023, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.strategies import STRATEGIES, Aggregate, Memory, State, Strategy, Update, deltas, moved


@STRATEGIES.register("ties")
class Ties(Strategy):
    """W ← W + λ τ with τ merged from the D_k: trim, elect signs, average those who agree.

    Trim keeps the largest coordinates of every D_k, over all parameters together, as D̂_k. The sign
    elected in a coordinate is that of Σ_k D̂_k, and τ the mean of the D̂_k ≠ 0 with this sign. Where
    the D̂_k cancel, τ = 0. Every client counts alike, whatever its samples.

    Args:
        density: Share of the coordinates that trimming keeps.
        scale: λ.
    """

    density: float = Field(0.2, gt=0, le=1)
    scale: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Merge updates without the coordinates in which they interfere."""
        by_name = {name: deltas(name, state, updates) for name in state}
        clients = sorted(update.client for update in updates)
        each = [{name: by_name[name][client] for name in state} for client in clients]
        return Aggregate(moved(state, merged(each, self.density), self.scale), memory)


def merged(updates: Sequence[State], density: float) -> State:
    """Trim, elect and merge whole updates of equal keys and shapes."""
    first = updates[0]
    flats = [torch.cat([tensor.flatten() for tensor in update.values()]) for update in updates]
    flat = elect_and_merge([trim(each, density) for each in flats])
    parts = flat.split([tensor.numel() for tensor in first.values()])
    return {name: part.view_as(first[name]) for name, part in zip(first, parts, strict=True)}


def trim(flat: Tensor, density: float) -> Tensor:
    """Zero all but the given share of largest magnitudes; those equal to the smallest one kept stay."""
    keep = max(round(density * flat.numel()), 1)
    magnitudes = flat.abs()
    return flat.where(magnitudes >= magnitudes.kthvalue(flat.numel() - keep + 1).values, 0)


def elect_and_merge(flats: Sequence[Tensor]) -> Tensor:
    """In every coordinate, the mean of the values that have the sign of their sum."""
    stacked = torch.stack(list(flats))
    signs = stacked.sum(0).sign()
    agreeing = stacked.sign() == signs
    return stacked.where(agreeing, 0).sum(0) / agreeing.sum(0).clamp(min=1)
