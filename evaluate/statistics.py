"""Intervals and tests: bootstrap over images, McNemar, paired t over seeds, Holm over comparisons.

Questions about one image are not independent, so images are resampled, not questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcmp.evaluate.metric import Metric

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
    summed = np.sum([metric.statistics for metric in metrics], axis=0)
    return Metric(first.images, summed, first.value, first.strata, first.divisible)


def interval(metric: Metric, generator: np.random.Generator, resamples: int) -> Score:
    """Score a metric and bootstrap it over images (percentile method).

    Args:
        metric: Statistics by item.
        generator: Source of the resamples.
        resamples: Number of bootstrap resamples.
    """
    low, high = np.quantile(bootstrap([metric], generator, resamples)[0], [0.025, 0.975])
    return Score(value_of(metric), float(low), float(high), len(metric.images))


def value_of(metric: Metric) -> float:
    """The score itself."""
    return float(metric.value(metric.statistics.sum(0)))


def bootstrap(
    metrics: Sequence[Metric], generator: np.random.Generator, resamples: int, *, merge: bool = False
) -> np.ndarray:
    """Scores of resampled images, the same resample for all metrics: `(metrics, resamples)` float64.

    Args:
        metrics: Of the same items in the same order; where the first has strata, images are resampled
            within each of them.
        generator: Source of the resamples.
        resamples: Number of resamples.
        merge: Draw how often each kind of image comes, images with the same statistics in all metrics
            being of one kind. It is the same distribution, from other draws and mostly far fewer.
    """
    first = metrics[0]
    strata = first.strata or [""] * len(first.images)
    places = list(zip(strata, first.images, strict=True))
    groups = {place: number for number, place in enumerate(dict.fromkeys(places))}
    index = np.array([groups[place] for place in places], int)
    parts: dict[str, list[int]] = {}
    for (stratum, _), number in groups.items():
        parts.setdefault(stratum, []).append(number)
    widths = [metric.statistics.shape[1] for metric in metrics]
    sums = np.zeros((len(groups), sum(widths)))
    np.add.at(sums, index, np.concatenate([metric.statistics for metric in metrics], 1))
    kinds = [_kinds(sums[inside], merge=merge) for inside in parts.values()]
    table = np.concatenate([rows for rows, _ in kinds])
    ends = np.cumsum(widths)[:-1]
    values: list[list[np.ndarray]] = [[] for _ in metrics]
    at_a_time = max(_DRAWS_IN_MEMORY // max(len(table), 1), 1)
    for start in range(0, resamples, at_a_time):
        number = min(at_a_time, resamples - start)
        draws = [_draws(len(rows), sizes, generator, number) for rows, sizes in kinds]
        drawn = np.concatenate(draws, 1).astype(float) @ table
        for place, each in enumerate(np.split(drawn, ends, 1)):
            values[place].append(metrics[place].value(each))
    return np.array([np.concatenate(each) for each in values])


def _kinds(rows: np.ndarray, *, merge: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows, and how many images each stands for; None where nearly all differ and are left as they are."""
    if not merge:
        return rows, np.ones(len(rows), int)
    unique, sizes = np.unique(rows, axis=0, return_counts=True)
    return (unique, sizes) if 4 * len(unique) < len(rows) else (rows, None)


def _draws(rows: int, sizes: np.ndarray | None, generator: np.random.Generator, number: int) -> np.ndarray:
    """How often each row comes among as many images as there are: `(number, rows)` int64."""
    if sizes is not None:
        return generator.multinomial(sizes.sum(), sizes / sizes.sum(), number)
    # Several times faster than a multinomial.
    places = generator.integers(0, rows, (number, rows)) + rows * np.arange(number)[:, None]
    return np.bincount(places.ravel(), minlength=number * rows).reshape(number, rows)


@dataclass(frozen=True)
class Gap:
    """Ours minus theirs on the same items: the 95 % interval and p of a paired bootstrap over images."""

    value: float
    low: float
    high: float
    p: float


def gap(
    ours: Sequence[Metric], theirs: Sequence[Metric], generator: np.random.Generator, resamples: int
) -> Gap:
    """Compare two methods on the same items, each by the mean over its seeds.

    P is twice the smaller share of resampled differences on one side of 0, never less than
    2 / (resamples + 1).

    Args:
        ours: A metric a seed.
        theirs: The same metric.
        generator: Source of the resamples.
        resamples: Number of resamples of the images, the same ones for all metrics.
    """
    values = bootstrap([*ours, *theirs], generator, resamples, merge=True)
    differences = values[: len(ours)].mean(0) - values[len(ours) :].mean(0)
    low, high = np.quantile(differences, [0.025, 0.975])
    side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p = min(1.0, 2 * (side + 1) / (resamples + 1))
    value = float(np.mean([value_of(m) for m in ours]) - np.mean([value_of(m) for m in theirs]))
    return Gap(value, float(low), float(high), p)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """P value of the exact McNemar test (two-sided binomial over the items where one alone is right).

    Args:
        ours: 0 or 1 an item.
        theirs: The same items.
    """
    from scipy.stats import binomtest

    only_ours = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(a < b for a, b in zip(ours, theirs, strict=True))
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


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


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios with its 95 % t interval (of logarithms) and p by sign flips."""

    value: float
    low: float
    high: float
    p: float


_FLIPS = 2**20


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare positive numbers, one pair a seed; at least two pairs.

    P is the two-sided share of sign flips of the logarithms whose mean is as far from 0; up to 20 pairs all
    flips are counted. It assumes no distribution, and n pairs cannot give less than 2 / 2^n.
    """
    from scipy import stats

    logs = np.log(ours) - np.log(theirs)
    of_logs = paired(logs.tolist(), [0.0] * len(logs))
    flipped = stats.permutation_test((logs,), np.mean, permutation_type="samples", n_resamples=_FLIPS)
    value, low, high = (float(np.exp(each)) for each in (of_logs.mean, of_logs.low, of_logs.high))
    return Ratio(value, low, high, float(flipped.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm, 1979), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
