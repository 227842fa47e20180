"""One round's clients as sums over them, which is all that some strategies need to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.matrices import Matrices, agreement
from fedcmp.federate.arithmetic.norms import factors, norm, shortened, usual_norms
from fedcmp.federate.arithmetic.updates import State, Update, data_weights, deltas, weighted_sum

Weights = dict[str, float]
Side = Literal["left", "right"]


class Gram(Protocol):
    """G = Σ_k p_k X_k X_kᵀ of one matrix, as `Matrices` has it; X_k is D_k, or D_kᵀ on the right side."""

    @property
    def shape(self) -> torch.Size:
        """Shape of every X_k."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed."""

    def gram(self, weights: Mapping[str, float]) -> Tensor:
        """G."""

    def gram_times(self, weights: Mapping[str, float], right: Tensor) -> Tensor:
        """G Ω."""

    def trace(self, weights: Mapping[str, float]) -> float:
        """Trace of G."""


class Cohort(ABC):
    """One round's clients; D_k are their updates."""

    @property
    @abstractmethod
    def shares(self) -> Weights:
        """p_k, their shares of the round's samples."""

    @abstractmethod
    def shorten(self, longest: float) -> Weights:
        """Give D_k its usual norm where it is more than `longest` times as long, before all else.

        Returns:
            What every D_k was multiplied with.
        """

    @abstractmethod
    def agreements(self, names: Sequence[str]) -> dict[str, Weights]:
        """c_k of every matrix and client: cosine of D_k with the others' consensus."""

    @abstractmethod
    def gram(self, name: str, side: Side) -> Gram:
        """G of a matrix's updates: Σ_k p_k D_k D_kᵀ on the left, Σ_k p_k D_kᵀ D_k on the right."""

    @abstractmethod
    def weigh(self, weights: Mapping[str, Weights]) -> None:
        """Announce ω_k of every parameter, for the sums below."""

    @abstractmethod
    def sum(self, name: str) -> Tensor:
        """Σ_k ω_k D_k of a parameter; the caller's to change."""


class Open(Cohort):
    """Clients whose updates are at hand."""

    def __init__(self, state: State, updates: Sequence[Update]) -> None:
        self._state, self._updates = state, updates
        self._weights: Mapping[str, Weights] = {}

    def matrices(self, name: str, *, whole: bool = False) -> Matrices:
        """Updates of a matrix, or the clients' whole matrices."""
        return Matrices.of(self._updates, name, None if whole else self._state[name])

    @property
    def shares(self) -> Weights:
        """Of the updates' samples."""
        return data_weights(self._updates)

    def shorten(self, longest: float) -> Weights:
        """Updates that are too long are shortened wherever they are used."""
        norms = {update.client: norm(self._state, update.state) for update in self._updates}
        samples = {update.client: update.samples for update in self._updates}
        found = factors(norms, usual_norms(norms, samples), longest)
        self._updates = [shortened(self._state, each, found[each.client]) for each in self._updates]
        return found

    def agreements(self, names: Sequence[str]) -> dict[str, Weights]:
        """Computed from the updates."""
        return {name: agreement(self.matrices(name), self.shares) for name in names}

    def gram(self, name: str, side: Side) -> Gram:
        """Computed from the updates."""
        return self.matrices(name) if side == "left" else self.matrices(name).transposed

    def weigh(self, weights: Mapping[str, Weights]) -> None:
        """Nothing is computed before it is asked for."""
        self._weights = weights

    def sum(self, name: str) -> Tensor:
        """Computed from the updates."""
        if self._state[name].ndim == 2:
            return self.matrices(name).sum(self._weights[name])
        return weighted_sum(deltas(name, self._state, self._updates), self._weights[name])
