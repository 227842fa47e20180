"""Who trains on which silos in which round; the server and every site derive the same from the experiment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError

if TYPE_CHECKING:
    from fedcmp.federate.strategies.base import Strategy


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run.

    Attributes:
        groups: Every client's silos, by the client's name.
        rounds: The clients of every round.
    """

    groups: dict[str, tuple[str, ...]]
    rounds: list[list[str]]

    def turns(self, first: int | None = None) -> Counter[str]:
        """How often each client takes part in the first rounds, or in all."""
        return Counter(client for round_ in self.rounds[:first] for client in round_)


def schedule_of(experiment: Experiment, strategy: Strategy) -> Schedule:
    """The rounds of an experiment.

    Raises:
        UserError: A client would never take part, or not in every round where it trains alone.
    """
    options = experiment.federate
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in options.silos}
    if strategy.pooled:
        groups = {"all": options.silos}
    made = Schedule(
        groups, participants(list(groups), options.rounds, options.clients_per_round, experiment.seed)
    )
    where = f"federate.clients_per_round = {options.clients_per_round}"
    turns = made.turns()
    never = [client for client in groups if options.rounds and not turns[client]]
    if never:
        raise UserError(
            f"{where}: {', '.join(never)} would never take part in {options.rounds} rounds; raise it, or "
            "federate.rounds"
        )
    if strategy.personal and options.clients_per_round:
        raise UserError(f"{where}: silos that train alone take part in every round; remove it")
    return made


def participants(clients: Sequence[str], rounds: int, per_round: int | None, seed: int) -> list[list[str]]:
    """Draw clients without replacement, cycle after cycle, so that all take part about equally often.

    Args:
        clients: All clients.
        rounds: Number of rounds.
        per_round: Clients a round; all by default.
        seed: Seed of the experiment.

    Returns:
        The clients of every round, in the order of `clients`.
    """
    size = min(per_round or len(clients), len(clients))
    generator = np.random.default_rng([seed, len(clients), size])
    waiting: list[str] = []
    drawn = []
    for _ in range(rounds):
        chosen = waiting[:size]
        waiting = waiting[size:]
        if len(chosen) < size:
            cycle = [clients[place] for place in generator.permutation(len(clients))]
            fresh = [client for client in cycle if client not in chosen]
            again = [client for client in cycle if client in chosen]
            missing = size - len(chosen)
            chosen, waiting = chosen + fresh[:missing], fresh[missing:] + again
        drawn.append([client for client in clients if client in chosen])
    return drawn
