"""Intervals and tests: bootstrap over images, paired t over seeds, Holm over comparisons.

Questions about one image are not independent, so images are resampled, not questions.
"""

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


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % t interval and two-sided p value."""

    mean: float
    low: float
    high: float
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Paired t test of `ours - theirs`, one pair a seed; at least two pairs."""
    from scipy import stats

    differences = np.subtract(ours, theirs)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    result = stats.ttest_1samp(differences, 0.0)
    low, high = result.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(result.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm, 1979), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
