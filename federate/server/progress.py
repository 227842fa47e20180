"""What a run carries from round to round, which is what its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedcmp.federate.arithmetic.updates import Memory, State
from fedcmp.federate.checkpoint import Checkpoint


@dataclass
class Progress(Checkpoint):
    """All that a run carries from round to round; a checkpoint is just this.

    Random order is derived from the seed and names, never from a running generator, so there is
    no generator state to keep.
    """

    state: State
    round: int = 0
    memory: Memory = field(default_factory=dict)
    personal: dict[str, State] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
