"""Intervals: bootstrap over images, because questions about one image are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.benchmarks.base import Metric

_DRAWS_IN_MEMORY = 4_000_000


@dataclass(frozen=True)
class Score:
    """A score with its 95 % bootstrap interval; `n` counts items."""

    value: float
    low: float
    high: float
    n: int


def pooled(metrics: Sequence[Metric]) -> Metric:
    """One metric over several projectors' answers to the same items: their statistics summed."""
    first, *_ = metrics
    return Metric(first.images, np.sum([metric.statistics for metric in metrics], axis=0), first.value)


def interval(metric: Metric, generator: np.random.Generator, resamples: int) -> Score:
    """Score a metric and bootstrap it over images (percentile method).

    Args:
        metric: Statistics by item.
        generator: Source of the resamples.
        resamples: Number of bootstrap resamples.
    """
    groups, index = np.unique(metric.images, return_inverse=True)
    sums = np.zeros((len(groups), metric.statistics.shape[1]))
    np.add.at(sums, index, metric.statistics)
    value = float(metric.value(sums.sum(0)))
    values = []
    at_a_time = max(_DRAWS_IN_MEMORY // len(groups), 1)
    for start in range(0, resamples, at_a_time):
        number = min(at_a_time, resamples - start)
        draws = generator.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), number)
        values.append(metric.value(draws.astype(float) @ sums))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return Score(value, float(low), float(high), len(metric.images))
