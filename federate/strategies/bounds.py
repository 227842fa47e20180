"""The bounds a federated run lies between: all data in one place, and every silo alone."""

from __future__ import annotations

from typing import ClassVar

from fedcmp.federate.strategies import STRATEGIES
from fedcmp.federate.strategies.fedavg import FedAvg


@STRATEGIES.register("centralised")
class Centralised(FedAvg):
    """Upper bound: one client holds the data of all silos."""

    pooled: ClassVar[bool] = True


@STRATEGIES.register("local_only")
class LocalOnly(FedAvg):
    """Lower bound: every silo trains its own projector; their one-shot average is the global one."""

    personal: ClassVar[bool] = True
