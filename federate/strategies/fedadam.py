"""FedAdam (Reddi et al., 2021, arXiv 2003.00295)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from fedcmp.federate.strategies import STRATEGIES
from fedcmp.federate.strategies.fedopt import FedOpt


@STRATEGIES.register("fedadam")
class FedAdam(FedOpt):
    """FedOpt with v ← β_2 v + (1 - β_2) Δ².

    Args:
        beta2: β_2, memory of the squares.
    """

    beta2: float = Field(0.99, ge=0, lt=1)

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """A moving average of the squares."""
        return self.beta2 * v + (1 - self.beta2) * square
