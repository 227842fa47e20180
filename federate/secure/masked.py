"""A round's clients when their updates stay with them: what a strategy sees are secure sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.cohort import Cohort, Gram, Side, Weights
from fedcmp.federate.arithmetic.norms import factors, usual_norms
from fedcmp.federate.arithmetic.updates import Memory, State, Update
from fedcmp.federate.secure.contribution import Place, parts_of
from fedcmp.federate.secure.summation import Exchange, secure_sum
from fedcmp.federate.strategies.base import Aggregate, Strategy
from fedcmp.pipeline.errors import DivergedError, DroppedOutError, SpoiledError

_ROUNDED = 1 + 1e-6
_TINY = 1e-9  # of the fixed point, a number


@dataclass(frozen=True)
class _Summed:
    """G of one matrix, summed already with p_k for weights."""

    shape: torch.Size
    total: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.total.dtype

    def gram(self, weights: Mapping[str, float]) -> Tensor:
        return self.total

    def gram_times(self, weights: Mapping[str, float], right: Tensor) -> Tensor:
        return self.total @ right

    def trace(self, weights: Mapping[str, float]) -> float:
        return float(self.total.diagonal().sum())


class Masked(Cohort):
    """Sums over clients by the protocol, at most two of them a round; the first when it is needed.

    Args:
        exchange: Reaches the clients.
        state: Global projector they started from.
        samples: Samples of every client, which the server knows.
        threshold: Clients that have to stay until the end.
        grams: Matrices and sides whose G is needed.

    Raises:
        DroppedOutError: Too few clients stayed.
    """

    def __init__(
        self,
        exchange: Exchange,
        state: State,
        samples: Mapping[str, int],
        threshold: int,
        grams: Sequence[Place],
    ) -> None:
        self._exchange, self._state, self._threshold = exchange, state, threshold
        self._samples, self._places = samples, grams
        self._factors = dict.fromkeys(samples, 1.0)
        self._norms: dict[str, float] = {}
        self._sums: State = {}

    @cached_property
    def _first(self) -> tuple[State, dict[Place, Tensor], Weights]:
        """Σ_k p_k D_k of everything, G of the matrices, and p_k of who is in them."""
        total = sum(self._samples.values())
        expected = {client: n / total for client, n in self._samples.items()}
        means, grams, survivors = self._summed(dict.fromkeys(self._state, expected), self._places)
        shares = {client: expected[client] for client in survivors}
        whole = sum(shares.values())
        for summed in [*means.values(), *grams.values()]:
            summed /= whole
        return means, grams, {client: share / whole for client, share in shares.items()}

    @property
    def shares(self) -> Weights:
        """Of those who stayed for the first sum."""
        return self._first[2]

    @property
    def means(self) -> State:
        """Σ_k p_k D_k of every parameter."""
        return self._first[0]

    def shorten(self, longest: float) -> Weights:
        """Every client reports its norm; one that does not is left out of the round."""
        replies = self._exchange({client: {"step": "norm"} for client in self._samples})
        norms = {client: float(replies[client]["norm"]) for client in sorted(replies)}
        for client, each in norms.items():
            if not (isfinite(each) and each >= 0):
                raise DivergedError(f"client '{client}' has an update of norm {each}")
        if len(norms) < self._threshold:
            raise DroppedOutError(
                f"a secure sum needs {self._threshold} clients, and {len(norms)} said how long their update "
                "is; run this again when the others are back"
            )
        self._norms = norms
        self._samples = {client: self._samples[client] for client in norms}
        self._factors = factors(norms, usual_norms(norms, self._samples), longest)
        return self._factors

    def _summed(
        self, weights: Mapping[str, Weights], grams: Sequence[Place]
    ) -> tuple[State, dict[Place, Tensor], list[str]]:
        """Sums of shortened updates: their factors are part of the weights."""
        once = {name: self._times(each, 1) for name, each in weights.items()}
        shares = next(iter(weights.values()))
        twice = self._times(shares, 2)
        asked: dict[str, dict[str, Weights]] = {}
        for side, name in grams:
            asked.setdefault(side, {})[name] = twice
        request: dict[str, Any] = {"updates": once, "grams": asked}
        vector, survivors = secure_sum(self._exchange, sorted(shares), self._threshold, request)
        updates, squares = parts_of(vector, self._state, list(weights), grams)
        self._check_lengths(updates, squares, once, survivors)
        return updates, squares, survivors

    def _check_lengths(
        self,
        updates: State,
        squares: Mapping[Place, Tensor],
        weights: Mapping[str, Weights],
        among: Sequence[str],
    ) -> None:
        """No sum is longer than what its clients said, ‖Σ w_k D_k‖ ≤ Σ w_k ‖D_k‖, for every parameter."""
        if not self._norms:
            return
        for name, total in updates.items():
            most = sum(weights[name][client] * self._norms[client] for client in among)
            if float(total.norm()) > most * _ROUNDED + _TINY * total.numel() ** 0.5:
                raise SpoiledError(
                    f"the secure sum of {name} has norm {float(total.norm()):.3g}, where the norms that "
                    f"{', '.join(among)} said allow {most:.3g}: one of them said less than it added"
                )
        most = sum(next(iter(weights.values()))[c] * self._factors[c] * self._norms[c] ** 2 for c in among)
        for (side, name), total in squares.items():
            if float(total.trace()) > most * _ROUNDED + _TINY * len(total):
                product = "D Dᵀ" if side == "left" else "Dᵀ D"
                raise SpoiledError(
                    f"the secure sum of {name} {product} is larger than the norms that were said allow"
                )

    def _times(self, weights: Weights, power: int) -> Weights:
        return {client: weight * self._factors[client] ** power for client, weight in weights.items()}

    def agreements(self, names: Sequence[str]) -> dict[str, Weights]:
        """Every client compares itself with the broadcast consensus; its cosines are not secret."""
        if len(self.shares) == 1:
            return {name: dict.fromkeys(self.shares, 1.0) for name in names}
        totals = {name: self.means[name] for name in names}
        requests = {
            client: {"step": "agree", "totals": totals, "share": share}
            for client, share in self._times(self.shares, 1).items()
        }
        replies = self._exchange(requests)
        missing = sorted(self.shares.keys() - replies.keys())
        if missing:
            raise DroppedOutError(
                f"{', '.join(missing)} left within a secure round; run this again when all are back"
            )
        return {name: {client: replies[client][name] for client in self.shares} for name in names}

    def gram(self, name: str, side: Side) -> Gram:
        """G, summed in the first sum."""
        total = self._first[1][side, name]
        return _Summed(total.shape, total)

    def weigh(self, weights: Mapping[str, Weights]) -> None:
        """A second sum, where weights are not the shares already."""
        if all(_close(each, self.shares) for each in weights.values()):
            self._sums = self.means
            return
        self._sums, _, survivors = self._summed(weights, ())
        for name, total in self._sums.items():
            total /= sum(weights[name][client] for client in survivors)

    def sum(self, name: str) -> Tensor:
        """Σ_k ω_k D_k of a parameter."""
        return self._sums[name].clone()


def _close(a: Weights, b: Weights) -> bool:
    return all(abs(a[client] - b[client]) <= 1e-12 for client in b)


def aggregate(
    strategy: Strategy,
    exchange: Exchange,
    state: State,
    samples: Mapping[str, int],
    threshold: int,
    memory: Memory,
) -> Aggregate:
    """Fuse a round of which the server sees sums alone.

    Raises:
        DroppedOutError: Too few clients stayed.
    """
    sums = strategy.sees() == "sums"
    matrices = [name for name, old in state.items() if old.ndim == 2]
    grams = [(side, name) for side in strategy.looks_at() for name in matrices]
    cohort = Masked(exchange, state, samples, threshold, grams if sums else ())
    if sums:
        return strategy.fuse(state, cohort, memory)
    # To a strategy that needs the mean alone, the round is one client that moved by it.
    moved = {name: old.double() + cohort.means[name] for name, old in state.items()}
    fused = strategy.aggregate(state, [Update("mean", moved, sum(samples.values()))], memory)
    return Aggregate(fused.state, fused.memory, {"weight": cohort.shares})
