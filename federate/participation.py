"""Who takes part in which round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
    schedule = []
    for _ in range(rounds):
        chosen = waiting[:size]
        waiting = waiting[size:]
        if len(chosen) < size:
            cycle = [clients[place] for place in generator.permutation(len(clients))]
            fresh = [client for client in cycle if client not in chosen]
            again = [client for client in cycle if client in chosen]
            missing = size - len(chosen)
            chosen, waiting = chosen + fresh[:missing], fresh[missing:] + again
        schedule.append([client for client in clients if client in chosen])
    return schedule
