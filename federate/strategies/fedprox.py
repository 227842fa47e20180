"""FedProx (Li et al., 2020, arXiv 1812.06127)."""

from __future__ import annotations

from pydantic import Field

from fedcmp.federate.strategies import STRATEGIES
from fedcmp.federate.strategies.fedavg import FedAvg


@STRATEGIES.register("fedprox")
class FedProx(FedAvg):
    """FedAvg of clients that minimise L_k(w) + μ / 2 · ‖w - w_t‖².

    Args:
        proximal: μ; larger values keep clients closer to the global projector.
        server_learning_rate: η_s; 1 gives the average of the clients.
    """

    proximal: float = Field(0.01, ge=0)
