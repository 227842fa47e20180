"""Pilot's connector (Xiong et al., 2025, arXiv 2501.13985) in our reading; equations: docs/pilot.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector
from fedcmp.pipeline.models.projectors.mlp import MlpProjector

_OUT_OF_REACH = -1e4
_EXPERT = "mlp2x_gelu"
# The task of those that have no other.
ONLY = "all"


class PilotProjector(Projector):
    """x = ψ_s(H) + Σ_i P_i ⊙ (ψ_i(H) + c_i(H)) with P = softmax(H Φᵀ + μ), a row a token.

    ψ_i are the adapters `task`, c_i `cross`, ψ_s `client`, Φ `router` and μ `mask`; a mask that leaves one
    task alone gives the first stage. `local` is what a client keeps to itself.
    """

    local: ClassVar[tuple[str, ...]] = ("client.", "cross.", "router.", "mask")
    grows_from: ClassVar[str] = _EXPERT

    def __init__(self, d_vision: int, d_llm: int, tasks: Iterable[str]) -> None:
        super().__init__(d_vision, d_llm)
        self.tasks = tuple(tasks)

        def adapters() -> nn.ModuleDict:
            return nn.ModuleDict({task: MlpProjector(d_vision, d_llm, 2) for task in self.tasks})

        self.task, self.cross, self.client = adapters(), adapters(), MlpProjector(d_vision, d_llm, 2)
        self.router = nn.Linear(d_vision, len(self.tasks), bias=False)
        self.register_buffer("mask", torch.zeros(len(self.tasks)))

    mask: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        return self.parts(features)[0]

    def parts(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Visual tokens, and the losses that keep the adapters apart and the router in balance.

        Returns:
            `(batch, patches, d_llm)`, and scalars: `difference` (equation 3), `balance` and `router_z` (4).
        """
        scores: Tensor = self.router(features) + self.mask
        shares = scores.softmax(-1)
        mixed = torch.zeros_like(features[..., :1])
        own = torch.zeros_like(mixed)
        for place, task in enumerate(self.tasks):
            share = shares[..., place, None]
            own = own + share * self.task[task](features)
            mixed = mixed + share * self.cross[task](features)
        client = self.client(features)
        return client + own + mixed, {
            "difference": difference(own, client),
            "balance": balance(shares),
            "router_z": scores.logsumexp(-1).square().mean(),
        }

    def leave_only(self, task: str | None) -> None:
        """Leave one task alone, as in the first stage, or all."""
        self.mask.fill_(0.0 if task is None else _OUT_OF_REACH)
        if task is not None:
            self.mask[self.tasks.index(task)] = 0.0

    @torch.no_grad()
    def begin(self, pretrained: Mapping[str, Tensor] | None = None) -> None:
        """Start all adapters from one, so that the tokens are that one's.

        Args:
            pretrained: A projector `mlp2x_gelu`; the first task's adapter by default.
        """
        state = dict(pretrained or self.task[self.tasks[0]].state_dict())
        silent = {
            name: torch.zeros_like(value) if "linear_2" in name else value for name, value in state.items()
        }
        for task in self.tasks:
            self.task[task].load_state_dict(state)
            self.cross[task].load_state_dict(silent)
        self.client.load_state_dict(silent)
        self.router.weight.zero_()
        self.leave_only(None)

    def completed(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Silent adapters of its own from the first task's, and a router that knows no task."""
        first = f"task.{self.tasks[0]}."
        fresh = PilotProjector(self.d_vision, self.d_llm, self.tasks)
        fresh.begin(
            {name.removeprefix(first): each for name, each in shared.items() if name.startswith(first)}
        )
        own = {name: each for name, each in fresh.state_dict().items() if name.startswith(self.local)}
        return own | dict(shared)


def difference(own: Tensor, client: Tensor) -> Tensor:
    """How alike the tokens of two adapters are, each `(batch, patches, d)`.

    A picture's tokens in a row, of unit length, are a row of A and of B: ‖AᵀB‖² / batch², which is the mean
    of ⟨a, a'⟩⟨b, b'⟩ over all pairs of pictures.
    """
    a, b = (normalize(tokens.flatten(1), dim=1) for tokens in (own, client))
    return ((a @ a.T) * (b @ b.T)).mean()


def balance(shares: Tensor) -> Tensor:
    """T Σ_i f_i p̄_i of shares `(batch, patches, T)`.

    f_i is the part of the tokens whose largest share is i, p̄_i the mean share.
    """
    tasks = shares.shape[-1]
    flat = shares.flatten(0, -2)
    largest = flat.argmax(-1).bincount(minlength=tasks) / len(flat)
    return tasks * (largest * flat.mean(0)).sum()


@PROJECTORS.register("pilot")
class Pilot(Architecture):
    """Adapters of several tasks, mixed by a router, and one of the client's own; MLPs as `mlp2x_gelu`.

    Args:
        tasks: Their names.
    """

    tasks: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], ...] = Field((ONLY,), min_length=1)

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        return PilotProjector(d_vision, d_llm, self.tasks)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        d_llm, d_vision = state[f"task.{self.tasks[0]}.linear_1.weight"].shape
        return d_vision, d_llm
