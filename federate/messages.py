"""What a client is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fedcmp.federate.arithmetic.updates import Measure, Objective, Sent, State


@dataclass(frozen=True)
class Job:
    """What the server asks of one client in one round; plain data, so it can travel.

    Attributes:
        client: Its name.
        start: Projector to start from.
        turn: Which part of its stream it trains on; counts the rounds it has taken part in.
        round: Round of the run, which sets the learning rate.
        rounds: Rounds in all.
        objective: What it minimises besides its loss.
        update: Whether it sends its `weights` or its `path` projector (`arithmetic.paths`).
        wants: What it must send besides its projector.
        measure: Of its alignment, where that is wanted.
        optimizer: Moments to go on from, or None.
        counted: Last round in which its answer counted, or None.
    """

    client: str
    start: State
    turn: int
    round: int
    rounds: int
    objective: Objective = field(default_factory=Objective)
    update: Literal["weights", "path"] = "weights"
    wants: frozenset[str] = frozenset()
    measure: Measure = "likelihood"
    optimizer: dict[str, Any] | None = None
    counted: int | None = None


@dataclass(frozen=True)
class LocalResult:
    """A client's projector after its local steps.

    `loss` is the mean negative log-likelihood a supervised token, in nats, over the round;
    `gradient` the mean clipped gradient of the loss along the path and `alignment` each matrix's
    contribution to alignment, where they were asked for; `recalled` says that equal training was
    done before. `sent` is the compressed update in place of `state`. `flops` are those of its steps, counted
    from shapes. Where it would tell more than may be learnt, there is None. `releases` counts how often the
    site has answered this round, this time included.
    """

    client: str
    state: Mapping[str, Tensor]
    loss: float | None
    samples: int
    steps: int
    tokens: int | None
    seconds: float | None
    optimizer: dict[str, Any] | None = None
    gradient: Mapping[str, Tensor] | None = None
    alignment: dict[str, float] | None = None
    recalled: bool = False
    sent: Sent | None = None
    releases: int = 1
    flops: float | None = None
