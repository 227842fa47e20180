"""What a benchmark is: official files in, items to answer, scores out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.cache import FeatureCache
from pipeline.config import Options
from pipeline.errors import UserError
from pipeline.records import Text
from pipeline.registry import Registry

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Item:
    """One thing to answer.

    `text` ends with the user's turn, or with the reference whose likelihood is asked for.
    """

    id: str
    image: str
    text: Text
    reference: str = ""


@dataclass(frozen=True)
class Metric:
    """A score as a function of sums over images, which is what a bootstrap needs.

    Attributes:
        images: The image of each row.
        statistics: `(rows, s)` float64.
        value: From sums `(..., s)` to scores `(...)`.
    """

    images: list[str]
    statistics: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


Answer = str | list[float]


class Benchmark(Options, ABC):
    """A benchmark's options and rules; `version` changes whenever its scores do.

    `asks` selects the template, `likelihood` whether answers are generated or references scored,
    and `headlines` are the metrics that a summary shows.
    """

    version: ClassVar[int]
    asks: ClassVar[Literal["caption", "question"]] = "question"
    likelihood: ClassVar[bool] = False
    headlines: ClassVar[tuple[str, ...]]

    silo: str | None = None
    max_new_tokens: int = Field(32, ge=1)

    @abstractmethod
    def items(self, cache: FeatureCache) -> list[Item]:
        """Everything to answer, in the order of the files.

        Raises:
            UserError: A file is missing or not in the official format.
        """

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, Metric]:
        """Metrics of answered items."""

    def show_reference(self, item: Item) -> str:
        """The reference as a person reads it."""
        return item.reference


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "evaluate.benchmarks")


def read_json_file(path: Path, what: str) -> Any:
    """Read a benchmark file.

    Raises:
        UserError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {what} is not valid JSON: {error}") from None


def field(entry: Any, name: str, place: str) -> Any:
    """A field of an entry.

    Raises:
        UserError: It is not there.
    """
    if not isinstance(entry, dict) or name not in entry:
        raise UserError(f"{place}: no field '{name}'; is this the official file?")
    return entry[name]


def mean(sums: np.ndarray) -> np.ndarray:
    """Mean from sums of (total, number)."""
    return ratio(sums[..., 0], sums[..., 1])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, float), where=denominator != 0)


def averaged(items: Sequence[Item], values: Sequence[float]) -> Metric:
    """The mean of one value an item."""
    statistics = np.array([[value, 1.0] for value in values]).reshape(-1, 2)
    return Metric([item.image for item in items], statistics, mean)
