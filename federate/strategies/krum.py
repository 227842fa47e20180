"""Krum and Multi-Krum (Blanchard et al., 2017, arXiv 1703.02757)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedcmp.federate.arithmetic.updates import Memory, State, Update, data_weights, mean_update, moved
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy


@STRATEGIES.register("krum")
class Krum(Strategy):
    """W ← the W_k with the smallest sum of squared distances to its K - f - 2 nearest others.

    f is lowered so that there is at least one such neighbour: with three clients or fewer, nothing
    protects against any. The paper's guarantee asks for K ≥ 2f + 3.

    Args:
        byzantine: f, clients that may send anything.
        keep: m, clients with the smallest sums to average by samples; without it K - f.
        server_learning_rate: Multiplies the step to them.
    """

    byzantine: int = Field(1, ge=0)
    keep: int | None = Field(1, ge=1)
    server_learning_rate: float = Field(1.0, gt=0)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Keep the clients closest to the others; of equals, those first by name."""
        liars = max(min(self.byzantine, len(updates) - 3), 0)
        sums = scores(updates, max(len(updates) - liars - 2, 1))
        ranked = sorted(updates, key=lambda update: (sums[update.client], update.client))
        chosen = ranked[: len(updates) - liars if self.keep is None else self.keep]
        weights = dict.fromkeys(sums, 0.0) | data_weights(chosen)
        step = mean_update(state, chosen)
        return Aggregate(moved(state, step, self.server_learning_rate), memory, {"weight": weights})


@STRATEGIES.register("multi_krum")
class MultiKrum(Krum):
    """Krum that averages all but f clients.

    Args:
        keep: m, clients with the smallest sums to average by samples; without it K - f.
    """

    keep: int | None = Field(None, ge=1)


def scores(updates: Sequence[Update], neighbours: int) -> dict[str, float]:
    """Every client's sum of squared distances to its nearest others, over all parameters together.

    Args:
        updates: The round's clients.
        neighbours: How many others count.
    """
    distances: dict[str, list[float]] = {update.client: [] for update in updates}
    for i, one in enumerate(updates):
        for other in updates[:i]:
            square = sum(
                float((one.state[name].double() - other.state[name].double()).square().sum())
                for name in sorted(one.state)
            )
            distances[one.client].append(square)
            distances[other.client].append(square)
    return {client: sum(sorted(squares)[:neighbours]) for client, squares in distances.items()}
