"""FedAdagrad (Reddi et al., 2021, arXiv 2003.00295)."""

from __future__ import annotations

from torch import Tensor

from fedcmp.federate.strategies import STRATEGIES
from fedcmp.federate.strategies.fedopt import FedOpt


@STRATEGIES.register("fedadagrad")
class FedAdagrad(FedOpt):
    """FedOpt with v ← v + Δ²; the paper's experiments have β_1 = 0."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The sum of all squares so far."""
        return v + square
