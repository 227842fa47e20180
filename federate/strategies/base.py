"""What an aggregation strategy is: arithmetic on client projectors, nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedcmp.federate.arithmetic.updates import Measure, Memory, Objective, State, Update
from fedcmp.pipeline import history
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.registry import Registry

if TYPE_CHECKING:
    from fedcmp.federate.arithmetic.cohort import Cohort, Side
    from fedcmp.pipeline.config import Federate


@dataclass(frozen=True)
class Aggregate:
    """What a strategy makes of a round.

    Attributes:
        state: The new global projector.
        memory: What the strategy remembers.
        figures: For the history, by name and client.
        personal: What clients start from in place of parts of the global projector, by client.
    """

    state: State
    memory: Memory
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    personal: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """What a client does in a round, where not all do the same.

    Attributes:
        trains: Beginnings of the names of what it trains; the rest of its state is frozen.
        task: The only task that its projector heeds; all by default.
        penalties: Weights of the projector's own losses.
    """

    trains: tuple[str, ...]
    task: str | None = None
    penalties: dict[str, float] = field(default_factory=dict)


def require_form(before: State, aggregate: Aggregate) -> None:
    """Refuse what is no projector of the same form, and figures in the place of the history's own.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(aggregate, Aggregate):
        raise TypeError(f"aggregate returned {type(aggregate).__name__}, not Aggregate")
    if aggregate.state.keys() != before.keys():
        names = ", ".join(sorted(aggregate.state.keys() ^ before.keys()))
        raise TypeError(f"aggregate returned a state with other keys: {names}")
    for name, old in before.items():
        new = aggregate.state[name]
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            found, expected = (f"{each.dtype} {tuple(each.shape)}" for each in (new, old))
            raise TypeError(f"aggregate returned {name} as {found}, not {expected}")
    taken = sorted(history.OF_EVERY_ROW & aggregate.figures.keys())
    if taken:
        raise TypeError(f"a figure is called '{taken[0]}', as one of the history's own; rename it")


class Strategy(Options, ABC):
    """A way to fuse client projectors; its options are its fields.

    `pooled`: all silos form a single client. `personal`: clients go on from their own projectors
    and never receive the global one. `wants`: optional fields of `Update` it cannot do without. `local`:
    beginnings of the names of what clients keep to themselves; no message has it.

    Args:
        update: What clients send: their `weights` W_k as they end, or where their mean gradient along
            the `path` leads, stretched to the length of their update (`arithmetic.paths`).
        proximal: FedProx's μ: pulls clients towards where they started (arXiv 1812.06127).
    """

    pooled: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wants: ClassVar[frozenset[str]] = frozenset()
    local: ClassVar[tuple[str, ...]] = ()

    update: Literal["weights", "path"] = "weights"
    proximal: float = Field(0.0, ge=0)

    def begin(self, state: State, samples: Mapping[str, int]) -> Memory:
        """Memory before the first round.

        Args:
            state: Initial global projector.
            samples: Every client's samples, of one pass.
        """
        return {}

    def objective(self, client: str, memory: Memory) -> Objective:
        """What a client minimises besides its loss in the next round."""
        return Objective(self.proximal)

    def role(self, client: str, round_: int) -> Role | None:
        """What a client does in a round; None where all train everything."""
        return None

    def refuse(self, options: Federate) -> None:
        """Refuse an experiment that it is not made for.

        Raises:
            UserError: Naming the option.
        """

    def warnings(self) -> list[str]:
        """What its options make likely to go wrong."""
        return []

    def aligned_by(self) -> Measure:
        """How clients measure their alignment, where it wants that (`client.alignment`)."""
        return "likelihood"

    def sees(self) -> Literal["updates", "mean", "sums"]:
        """What it has to know of a round: every update, their mean alone, or sums (`fuse`)."""
        return "updates"

    def looks_at(self) -> tuple[Side, ...]:
        """Sides of the matrices whose G it needs, where it sees sums."""
        return ()

    def releases(self) -> int:
        """Different sums of the same updates that a round takes at most, where it sees sums."""
        return 1

    def fuse(self, state: State, cohort: Cohort, memory: Memory) -> Aggregate:
        """What `aggregate` does, from sums over clients alone; of strategies that see `sums`."""
        raise NotImplementedError

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Fuse one round's client projectors. Pure: the arguments are not changed.

        Args:
            state: Global projector the clients started from, float32.
            updates: At least one, in any order, with the keys and shapes of `state`.
            memory: What `begin` or the last round returned.
        """


STRATEGIES: Registry[Strategy] = Registry("strategy", "fedcmp.federate.strategies")
