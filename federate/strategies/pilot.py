"""Pilot (Xiong et al., 2025, arXiv 2501.13985) in our reading: docs/pilot.md has the equations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedcmp.federate.arithmetic.neighbours import distances, mixed, shares_of_neighbours
from fedcmp.federate.strategies import (
    STRATEGIES,
    Aggregate,
    Memory,
    State,
    Strategy,
    Update,
    data_weights,
    mean_update,
    moved,
)
from fedcmp.federate.strategies.base import Role
from fedcmp.pipeline.models import lora
from fedcmp.pipeline.models.projectors.pilot import PilotProjector

_TEXT = lora.PREFIX


@STRATEGIES.register("pilot")
class Pilot(Strategy):
    """Clients of several tasks: what sees is averaged within a task, what speaks among the nearest clients.

    It trains the projector `pilot` and an adapter of the LLM.

    Args:
        tasks: The task of every silo.
        stage_one: Rounds of the first stage, in which clients tell their own from their task's.
        neighbours: M, by default the other clients of the smallest task.
        visual: Whose adapters are averaged: those of the `task`, or of `all` clients.
        text: How the LLM's adapters are averaged: by `distance`, or over all by `samples`.
        mixture: Learn from other tasks' adapters in the second stage.
        specific: Give clients an adapter of their own in the first stage.
        difference: Weight of the loss that keeps it apart from the task's.
        balance: Weight of the loss that keeps the router in balance.
        router_z: Weight of the loss that keeps its scores small.
    """

    local: ClassVar[tuple[str, ...]] = PilotProjector.local

    tasks: dict[str, str] = Field(min_length=1)
    stage_one: int = Field(1, ge=0)
    neighbours: int | None = Field(None, ge=0)
    visual: Literal["task", "all"] = "task"
    text: Literal["distance", "samples"] = "distance"
    mixture: bool = True
    specific: bool = True
    difference: float = Field(0.1, ge=0)
    balance: float = Field(0.1, ge=0)
    router_z: float = Field(0.01, ge=0)

    def role(self, client: str, round_: int) -> Role:
        """The first stage's, or the second's."""
        own = self.tasks[client]
        if round_ < self.stage_one:
            mine = ("client.",) if self.specific else ()
            return Role((f"task.{own}.", *mine, _TEXT), own, {"difference": self.difference} if mine else {})
        if not self.mixture:
            return Role((f"task.{own}.", _TEXT), own, {})
        others = [f"cross.{task}." for task in dict.fromkeys(self.tasks.values()) if task != own]
        losses = {"balance": self.balance, "router_z": self.router_z}
        return Role((f"task.{own}.", *others, "router.", _TEXT), None, losses)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Average what sees for all, and what speaks for every client."""
        ordered = sorted(updates, key=lambda update: update.client)
        tasks = [self.tasks[update.client] for update in ordered]
        fused = dict(moved(state, mean_update(state, ordered)))
        if self.visual == "task":
            for name, old in state.items():
                if not name.startswith(_TEXT):
                    own = [
                        each
                        for each, task in zip(ordered, tasks, strict=True)
                        if name.startswith(f"task.{task}.")
                    ]
                    fused[name] = moved({name: old}, mean_update({name: old}, own))[name] if own else old
        texts = {
            update.client: {name: each for name, each in update.state.items() if name.startswith(_TEXT)}
            for update in ordered
        }
        figures = {"weight": data_weights(ordered)}
        if not next(iter(texts.values())):
            return Aggregate(fused, memory, figures)
        apart = distances(texts)
        nearest = (apart + torch.diag(torch.full((len(apart),), torch.inf))).argmin(1)
        if len(ordered) > 1:
            figures["nearest_same_task"] = {
                update.client: float(tasks[near] == task)
                for update, task, near in zip(ordered, tasks, nearest.tolist(), strict=True)
            }
        if self.text == "samples":
            return Aggregate(fused, memory, figures)
        samples = torch.tensor([update.samples for update in ordered], dtype=torch.float64)
        weights = shares_of_neighbours(apart, samples, self._neighbours())
        return Aggregate(fused, memory, figures, personal=mixed(texts, weights))

    def _neighbours(self) -> int:
        return min(Counter(self.tasks.values()).values()) - 1 if self.neighbours is None else self.neighbours

    def warnings(self) -> list[str]:
        """What its options make likely to go wrong."""
        most = min(Counter(self.tasks.values()).values()) - 1
        if self.text == "distance" and self._neighbours() > most:
            return [
                f"federate.strategy.neighbours = {self.neighbours}: the smallest task has {most} other "
                "clients, so that some of another task are averaged in"
            ]
        return []
