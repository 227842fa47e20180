"""Aggregation strategies, one file a method, and the words in which one is written."""

from fedcmp.federate.arithmetic.updates import (
    Memory,
    Objective,
    State,
    Update,
    by_coordinate,
    data_weights,
    deltas,
    distance,
    mean_update,
    moved,
    recall_shares,
    remember_shares,
    weighted_sum,
)
from fedcmp.federate.strategies.base import STRATEGIES, Aggregate, Strategy

__all__ = [
    "STRATEGIES",
    "Aggregate",
    "Memory",
    "Objective",
    "State",
    "Strategy",
    "Update",
    "by_coordinate",
    "data_weights",
    "deltas",
    "distance",
    "mean_update",
    "moved",
    "recall_shares",
    "remember_shares",
    "weighted_sum",
]
