"""What an aggregation strategy is: arithmetic on client projectors, nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config import Options
from pipeline.registry import Registry

State = dict[str, Tensor]
Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one client sends: its trained projector and the number of samples it saw."""

    client: str
    state: State
    samples: int


@dataclass(frozen=True)
class Aggregate:
    """The new global projector, what the strategy remembers, and figures by name and client."""

    state: State
    memory: Memory
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


class Strategy(Options, ABC):
    """A way to fuse client projectors; its options are its fields.

    `pooled`: all silos form a single client. `personal`: clients go on from their own projectors
    and never receive the global one.
    """

    pooled: ClassVar[bool] = False
    personal: ClassVar[bool] = False

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Fuse one round's client projectors. Pure: the arguments are not changed.

        Args:
            state: Global projector the clients started from, float32.
            updates: At least one, in any order, with the keys and shapes of `state`.
            memory: What the last round returned; empty in the first.
        """


STRATEGIES: Registry[Strategy] = Registry("strategy", "federate.strategies")


def check(state: State, updates: Sequence[Update]) -> None:
    """Refuse updates that would spoil the global projector.

    Raises:
        ValueError: Naming the client whose update has other keys, shapes, or values not finite.
    """
    if not updates:
        raise ValueError("no client sent an update")
    for update in updates:
        if update.state.keys() != state.keys():
            raise ValueError(f"client '{update.client}' sent other keys than the global projector's")
        if update.samples <= 0:
            raise ValueError(f"client '{update.client}' reports {update.samples} samples")
        for name, tensor in update.state.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"client '{update.client}' sent {name} of shape {tuple(tensor.shape)}, "
                    f"not {tuple(state[name].shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"client '{update.client}' sent values that are not finite in {name}")


def data_weights(updates: Sequence[Update]) -> dict[str, float]:
    """p_k = n_k / Σ n."""
    total = sum(update.samples for update in updates)
    return {update.client: update.samples / total for update in updates}


def weighted_sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k T_k in float64, in order of client names, so that arrival order does not matter."""
    return torch.stack([weights[client] * tensors[client].double() for client in sorted(tensors)]).sum(0)
