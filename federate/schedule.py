"""Who trains on which silos in which round; the server and every site derive the same from the experiment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedcmp.federate.participation import participants
from fedcmp.federate.privacy.rules import refuse
from fedcmp.pipeline.config import Experiment, Federate
from fedcmp.pipeline.errors import UserError

LEAST = 3

if TYPE_CHECKING:
    from fedcmp.federate.strategies.base import Strategy


@dataclass(frozen=True)
class Plan:
    """The rounds of a run.

    Attributes:
        groups: Every client's silos, by the client's name.
        schedule: The clients of every round.
    """

    groups: dict[str, tuple[str, ...]]
    schedule: list[list[str]]

    def turns(self, rounds: int | None = None) -> Counter[str]:
        """How often each client takes part in the first `rounds` rounds, or in all."""
        return Counter(client for round_ in self.schedule[:rounds] for client in round_)


def plan(experiment: Experiment, strategy: Strategy) -> Plan:
    """The rounds of an experiment.

    Raises:
        UserError: A client would never take part, or not in every round where it trains alone.
    """
    options = experiment.federate
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in options.silos}
    if strategy.pooled:
        groups = {"all": options.silos}
    made = Plan(
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
    if options.communication is not None and options.secure:
        raise UserError(
            f"federate.communication.payload = '{options.communication.payload}': secure sums are of exact "
            "numbers; use float32"
        )
    if options.secure and find_spec("cryptography") is None:
        raise UserError("federate.privacy.secure: needs cryptography; run: pip install 'fedcmp[privacy]'")
    if options.secure:
        _refuse_insecure(options, made, strategy)
    refuse(experiment, strategy)
    return made


def _refuse_insecure(options: Federate, made: Plan, strategy: Strategy) -> None:
    """Refuse what cannot be done when the server sees sums alone."""
    where, name = "federate.privacy.secure", options.strategy.name
    if strategy.sees() == "updates" or strategy.pooled or strategy.personal:
        raise UserError(
            f"{where}: strategy '{name}', as configured, has to see every client's update; use one that "
            "needs only sums (docs/privacy.md)"
        )
    if options.optimizer.carry:
        raise UserError(f"{where}: moments that clients carry on would reveal their updates; remove carry")
    least = LEAST + strategy.releases() - 1
    fewest = min(map(len, made.schedule), default=least)
    if fewest < least:
        sums = "a sum" if least == LEAST else f"{strategy.releases()} sums of the same updates"
        raise UserError(
            f"{where}: {sums} over {fewest} clients hides nobody; at least {least} must take part"
        )
