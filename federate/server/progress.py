"""What a run carries from round to round, which is what its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedcmp.federate.arithmetic.updates import Memory, State
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import atomic


@dataclass
class Progress:
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

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a checkpoint atomically, without a second copy of it in memory."""
        with atomic(path) as file:
            torch.save({"fingerprint": fingerprint, **vars(self)}, file)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Progress | None:
        """Read a checkpoint, or None where there is none of this configuration.

        Raises:
            UserError: The file is no checkpoint.
        """
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, weights_only=True)
            ours = saved.pop("fingerprint") == fingerprint
        except Exception:
            raise UserError(f"{path}: damaged, not a checkpoint; delete it to train from the start") from None
        return cls(**saved) if ours else None
