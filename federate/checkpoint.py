"""What training carries on, as a file from which it goes on after an interruption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import atomic


@dataclass
class Checkpoint:
    """A data class whose fields are all that training carries on, of types that `weights_only` reads."""

    def save(self, path: Path, fingerprint: str) -> None:
        """Write it atomically, without a second copy of it in memory."""
        with atomic(path) as file:
            torch.save({"fingerprint": fingerprint, **vars(self)}, file)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Self | None:
        """Read a checkpoint, or None where there is none of this configuration.

        Raises:
            UserError: The file is no checkpoint.
        """
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, weights_only=True)
            if saved.pop("fingerprint") == fingerprint:
                return cls(**saved)
        except Exception:
            raise UserError(f"{path}: damaged, not a checkpoint; delete it to train from the start") from None
        say(f"{path.parent}: the checkpoint there is of another configuration; starting anew")
        return None
