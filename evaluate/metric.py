"""A benchmark's figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A score as a function of sums over images, which is what a bootstrap needs.

    Attributes:
        images: The image of each row.
        statistics: `(rows, s)` float64.
        value: From sums `(..., s)` to scores `(...)`.
        strata: The part of the benchmark each row belongs to, where images are resampled within parts.
        divisible: Whether some of the rows have a value of their own, which is that of their sums.
    """

    images: list[str]
    statistics: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    strata: list[str] | None = None
    divisible: bool = True


def mean(sums: np.ndarray) -> np.ndarray:
    """Mean from sums of (total, number)."""
    return ratio(sums[..., 0], sums[..., 1])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, float), where=denominator != 0)
