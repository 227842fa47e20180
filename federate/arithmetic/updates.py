"""A round's updates, and what every strategy computes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.lazy import Lazy

State = dict[str, Tensor]


Memory = dict[str, Tensor]


Measure = Literal["likelihood", "cka"]


_PIECE = 2**16
_STACK = 2**21


@dataclass(frozen=True)
class Objective:
    """What a client minimises besides its loss: ⟨linear, w⟩ + proximal / 2 · ‖w - w_t‖².

    FedProx, SCAFFOLD and FedDyn are all of this form; w_t is where the client starts.
    """

    proximal: float = 0.0
    linear: State | None = None


@dataclass(frozen=True)
class Update:
    """What one client sends: its trained projector and what it saw.

    Attributes:
        client: Its name.
        state: Its projector, float32; perhaps in a file, and read anew whenever a tensor is asked for.
        samples: Samples of this round.
        steps: Local optimiser steps of this round.
        gradient: Mean stochastic gradient of the loss along the local path, where the strategy
            `wants` it.
        alignment: How much each weight matrix contributes to the alignment of visual tokens with
            text embeddings, by name, where the strategy `wants` it.
    """

    client: str
    state: Mapping[str, Tensor]
    samples: int
    steps: int = 1
    gradient: Mapping[str, Tensor] | None = None
    alignment: dict[str, float] | None = None


def check(state: State, updates: Sequence[Update]) -> None:
    """Refuse updates that would spoil the global projector.

    Raises:
        ValueError: Naming the client whose update has other keys, shapes, or values not finite.
    """
    if not updates:
        raise ValueError("no client sent an update")
    for update in updates:
        if update.samples <= 0:
            raise ValueError(f"client '{update.client}' reports {update.samples} samples")
        _check_state(state, update.state, update.client)
        if update.gradient is not None:
            _check_state(state, update.gradient, update.client, "the gradient of ")
        for name, contribution in (update.alignment or {}).items():
            if not isfinite(contribution):
                raise ValueError(f"client '{update.client}' sent an alignment of {name} that is not finite")


def _check_state(expected: State, sent: Mapping[str, Tensor], client: str, what: str = "") -> None:
    if sent.keys() != expected.keys():
        raise ValueError(f"client '{client}' sent other keys than the global projector's")
    for name, tensor in sent.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"client '{client}' sent {what}{name} of shape {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"client '{client}' sent values that are not finite in {what}{name}")


def data_weights(updates: Sequence[Update]) -> dict[str, float]:
    """p_k = n_k / Σ n."""
    total = sum(update.samples for update in updates)
    return {update.client: update.samples / total for update in updates}


def weighted_sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k T_k in float64, in order of client names, so that arrival order does not matter."""
    total = torch.zeros_like(next(iter(tensors.values())), dtype=torch.float64)
    for client in sorted(tensors):
        total.add_(tensors[client], alpha=weights[client])
    return total


def deltas(name: str, state: State, updates: Sequence[Update]) -> Mapping[str, Tensor]:
    """D_k = W_k - W of one parameter by client, float64, in order of client names; made when asked for."""
    old, of = state[name].double(), {update.client: update.state for update in updates}
    return Lazy(sorted(of), lambda client: of[client][name].double() - old)


def by_coordinate(
    name: str, state: State, updates: Sequence[Update], rule: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a rule makes of D_k of one parameter, coordinate by coordinate.

    Args:
        name: Of the parameter.
        state: W.
        updates: W_k.
        rule: `(clients, n)` float64, in order of client names, to `(n,)`.
    """
    ordered, old = sorted(updates, key=lambda update: update.client), state[name].reshape(-1)
    fused = torch.empty(old.shape, dtype=torch.float64)
    size = max(_STACK // len(ordered), 1)
    for start in range(0, len(old), size):
        some = slice(start, start + size)
        before = old[some].double()
        each = [update.state[name].reshape(-1)[some].double() - before for update in ordered]
        fused[some] = rule(torch.stack(each))
    return fused.view(state[name].shape)


def mean_update(state: State, updates: Sequence[Update], weights: Mapping[str, float] | None = None) -> State:
    """Σ_k w_k D_k of every parameter, float64; weights are the data shares by default."""
    weights = weights or data_weights(updates)
    ordered = sorted(updates, key=lambda update: update.client)
    mean = {name: torch.zeros(old.shape, dtype=torch.float64) for name, old in state.items()}
    for name, old in state.items():
        for update in ordered:
            # Piece by piece: float64 copies of all updates at once would be twice what was sent.
            pieces = (tensor.reshape(-1).split(_PIECE) for tensor in (mean[name], update.state[name], old))
            for total, new, start in zip(*pieces, strict=True):
                total.add_(new.double() - start, alpha=weights[update.client])
    return mean


def moved(state: State, step: State, rate: float = 1.0) -> State:
    """W + rate · step of every parameter, in the dtype of W."""
    return {name: torch.add(old, step[name], alpha=rate).to(old.dtype) for name, old in state.items()}


def remember_shares(samples: Mapping[str, int]) -> Memory:
    """Every client's share of the samples of the whole pass, as memory."""
    total = sum(samples.values())
    return {f"share/{client}": torch.tensor(n / total, dtype=torch.float64) for client, n in samples.items()}


def recall_shares(memory: Memory) -> dict[str, float]:
    """What `remember_shares` put into memory."""
    prefix = "share/"
    return {key.removeprefix(prefix): float(p) for key, p in memory.items() if key.startswith(prefix)}


def distance(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference of two projectors."""
    return float(sum(float((after[name] - before[name]).double().square().sum()) for name in before)) ** 0.5


Sent = dict[str, dict[str, Tensor]]
