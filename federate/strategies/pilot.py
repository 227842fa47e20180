"""Pilot (Xiong et al., 2025, arXiv 2501.13985) in our reading: docs/pilot.md has the equations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

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
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models import lora
from fedcmp.pipeline.models.projectors import PROJECTORS
from fedcmp.pipeline.models.projectors.pilot import ONLY, PilotProjector
from fedcmp.pipeline.models.projectors.pilot import Pilot as Connector

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Federate

_TEXT = lora.PREFIX


@STRATEGIES.register("pilot")
class Pilot(Strategy):
    """Clients of several tasks: what sees is averaged within a task, what speaks among the nearest clients.

    It trains the projector `pilot` and an adapter of the LLM.

    Args:
        tasks: The task of every silo; all have one by default.
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

    tasks: dict[str, str] = Field(default_factory=dict)
    stage_one: int = Field(1, ge=0)
    neighbours: int | None = Field(None, ge=0)
    visual: Literal["task", "all"] = "task"
    text: Literal["distance", "samples"] = "distance"
    mixture: bool = True
    specific: bool = True
    difference: float = Field(0.1, ge=0)
    balance: float = Field(0.1, ge=0)
    router_z: float = Field(0.01, ge=0)

    def refuse(self, options: Federate) -> None:
        """It needs the projector `pilot` with the clients' tasks, and every client by itself.

        Raises:
            UserError: Naming the option.
        """
        where = "federate.strategy.tasks"
        projector = PROJECTORS.build(options.projector, "federate.projector")
        if not isinstance(projector, Connector):
            raise UserError(
                f"federate.projector.name = '{options.projector.name}': strategy 'pilot' trains the "
                "projector 'pilot'"
            )
        if missing := [silo for silo in options.silos if self.tasks and silo not in self.tasks]:
            raise UserError(f"{where}: {', '.join(missing)} have no task; name one for every silo")
        if strangers := sorted({self._task(silo) for silo in options.silos} - set(projector.tasks)):
            raise UserError(
                f"{where}: {', '.join(strangers)} are none of federate.projector.tasks = "
                f"{list(projector.tasks)}"
            )
        if options.together > 1:
            raise UserError(
                f"federate.together = {options.together}: 'pilot' trains clients one by one; set it to 1"
            )
        if self.update == "path":
            raise UserError(
                "federate.strategy.update = 'path': 'pilot' averages where clients end; use 'weights'"
            )

    def role(self, client: str, round_: int) -> Role:
        """The first stage's, or the second's."""
        own = self._task(client)
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
        tasks = [self._task(update.client) for update in ordered]
        fused = dict(moved(state, mean_update(state, ordered)))
        for name, old in state.items() if self.visual == "task" else ():
            if name.startswith("task."):
                whose = name.split(".")[1]
                own = [update for update, task in zip(ordered, tasks, strict=True) if task == whose]
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

    def _task(self, client: str) -> str:
        return self.tasks.get(client, ONLY)

    def _neighbours(self) -> int:
        return self._fellows() if self.neighbours is None else self.neighbours

    def _fellows(self) -> int:
        """Other clients of the smallest task."""
        return min(Counter(self.tasks.values()).values(), default=1) - 1

    def warnings(self) -> list[str]:
        """What its options make likely to go wrong."""
        most = self._fellows()
        if self.text == "distance" and self._neighbours() > most:
            return [
                f"federate.strategy.neighbours = {self.neighbours}: the smallest task has {most} other "
                "clients, so that some of another task are averaged in"
            ]
        return []
