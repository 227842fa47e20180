"""What benchmarks there are and what their options mean, from their classes alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fedcmp.evaluate.benchmarks.base import BENCHMARKS, Benchmark
from fedcmp.pipeline.describe import Option, documented, options_of


@dataclass(frozen=True)
class Description:
    """A benchmark: its name, what it is, how it is scored, its own options, and those that all have."""

    name: str
    about: str
    scores: str
    own: list[Option]
    common: list[Option]


def described(names: list[str]) -> list[Description]:
    """Benchmarks by their names."""
    return [_description(name, BENCHMARKS.registered(name)) for name in names]


def _description(name: str, cls: type[Benchmark]) -> Description:
    scores, _ = documented(cls)
    about = (sys.modules[cls.__module__].__doc__ or scores).strip().split("\n\n")[0]
    options = options_of(cls)
    usual = {field: info.get_default() for field, info in Benchmark.model_fields.items()}
    common = {field for field, value in usual.items() if cls.model_fields[field].get_default() == value}
    return Description(
        name,
        " ".join(about.split()),
        scores,
        [option for option in options if option.name not in common],
        [option for option in options if option.name in common],
    )
