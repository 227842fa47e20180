"""What an alignment carries from generation to generation, which is what its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.checkpoint import Checkpoint


@dataclass
class Progress(Checkpoint):
    """All that an alignment carries on; what is drawn depends on seeds and numbers alone.

    Attributes:
        state: The policy.
        safe: The policy whose answers were last seen within the limit of KL.
        safe_step: After how many steps that was.
        step: Steps, or rounds, that were taken.
        optimizer: Its moments.
        omega: The router's matrix, None before it is fitted.
        deviations: What the rewards are divided by.
        contents: The reward models, as their sites name them.
        kinds: Kinds of prompts that are trained on.
        agreement: Share of public preferences of each kind that the mixture ranks right, None without any.
        stopped: Whether the limit of KL was exceeded.
    """

    state: State
    safe: State
    safe_step: int = 0
    step: int = 0
    optimizer: dict[str, Any] | None = None
    omega: Tensor | None = None
    deviations: Tensor | None = None
    contents: dict[str, str] = field(default_factory=dict)
    kinds: list[int] = field(default_factory=list)
    agreement: dict[str, float | None] = field(default_factory=dict)
    stopped: bool = False
