"""Which micro-batches of a step are computed here: all of them, or a share beside other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from fedcmp.federate.messages import Job, LocalResult

Part = Callable[[int], Sequence[Tensor]]
Train = Callable[[Sequence[Job]], list[LocalResult]]


class Share(Protocol):
    """Takes part in training clients; all that take part end in the same projector.

    Attributes:
        alone: Whether all of it is computed here.
    """

    alone: bool

    def trained(self, jobs: Sequence[Job], train: Train) -> list[LocalResult]:
        """Train clients by `train`, wherever shares of it are computed."""

    def summed(self, count: int, part: Part, like: Sequence[Tensor]) -> list[Tensor]:
        """The parts of all micro-batches, summed tensor by tensor.

        Args:
            count: Micro-batches of a step, at least one.
            part: Computes the tensors of micro-batch i; called for those of this share.
            like: Tensors of their shapes, dtypes and device.
        """

    def merged(self, values: Tensor) -> Tensor:
        """Values that each share has for its own micro-batches, and zeros for all others, together."""


class Whole:
    """All of it is computed here."""

    alone = True

    def trained(self, jobs: Sequence[Job], train: Train) -> list[LocalResult]:
        """Train them."""
        return train(jobs)

    def summed(self, count: int, part: Part, like: Sequence[Tensor]) -> list[Tensor]:
        """Add the parts in their order."""
        total = list(part(0))
        for number in range(1, count):
            for tensor, more in zip(total, part(number), strict=True):
                tensor.add_(more)
        return total

    def merged(self, values: Tensor) -> Tensor:
        """The values."""
        return values
