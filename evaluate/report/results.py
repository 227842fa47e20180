"""What the report shows: plain values, without a benchmark or a file behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Column = tuple[str, str]
Score = Mapping[str, float]
Side = Literal["higher", "lower"] | None


# The kind of groups that are a benchmark's own parts.
PART = "part of the benchmark"
Verdict = Literal["better", "worse", "higher", "lower", "no clear difference"]


@dataclass(frozen=True)
class RunResult:
    """What the report shows of one run.

    Attributes:
        name: The run's name.
        strategy: Its strategy.
        scores: By benchmark and metric.
        headlines: (benchmark, metric) of a summary.
        notes: What scores must not be quoted without, by benchmark; or why there are none.
        history: Its rows by round and client.
        better: Which values of a headline are better; one that has no better values is not in it.
        others: Why scores are not comparable with the first run's, by benchmark.
        facts: What the run was made of, in words, by what it is.
        silos: Training texts of every silo.
        limits: How many questions were taken, by benchmark, where that is not all.
        warnings: What a person must know of the answers, by benchmark.
        sampled: Answers to public prompts before and after an alignment.
    """

    name: str
    strategy: str
    scores: dict[str, dict[str, dict[str, float]]]
    headlines: list[Column]
    notes: dict[str, str]
    history: list[dict[str, Any]]
    better: dict[Column, Literal["higher", "lower"]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    silos: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    sampled: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Versus:
    """One headline of a run against the baseline on the same questions.

    Attributes:
        run: The run.
        column: (benchmark, metric).
        value: The run's value there.
        base: The baseline's.
        difference: Value minus base.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p: Of the paired bootstrap over images.
        adjusted: P adjusted (Holm) for all comparisons of the report.
        n: Questions both answered.
        dropped: Questions that one of them did not answer.
        verdict: `better` or `worse` where the adjusted p is below 0.05 and values have a better side.
    """

    run: str
    column: Column
    value: float
    base: float
    difference: float
    low: float
    high: float
    p: float
    adjusted: float
    n: int
    dropped: int
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All runs against a baseline; `missing` says what could not be compared."""

    baseline: str
    rows: list[Versus]
    missing: list[str]


@dataclass(frozen=True)
class Grouped:
    """One metric by groups: silos, domains or parts of a benchmark.

    Attributes:
        column: (benchmark, metric).
        what: What the groups are.
        better: Which values are better, where either are.
        scores: By group and run.
    """

    column: Column
    what: str
    better: Side
    scores: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class Said:
    """One run's answer; `right` is None where answers are not right or wrong.

    `by` names the silo whose projector gave it, where a run has several.
    """

    run: str
    answer: str
    right: bool | None
    by: str = ""


@dataclass(frozen=True)
class Sample:
    """One question about one picture, with every run's answer; `picture` is a file in the format `form`."""

    benchmark: str
    image: str
    picture: bytes | None
    question: str
    reference: str
    said: list[Said]
    form: str = "png"


# Questions by benchmark, run and verdict (`right`, `wrong`, `disagree`, "" for all), of which samples are
# shown; the run "" stands for any of them.
Totals = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        experiment: Its name.
        runs: What was evaluated.
        absent: Why other runs are not there, by name.
        columns: Every (benchmark, metric), in order.
        comparison: Against the baseline; None of a single run.
        groups: Scores by silo, domain or part.
        samples: Questions to show.
        totals: What they are samples of.
    """

    experiment: str
    runs: list[RunResult]
    absent: dict[str, str] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    comparison: Comparison | None = None
    groups: list[Grouped] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    totals: Totals = field(default_factory=dict)

    @property
    def headlines(self) -> list[Column]:
        """What a summary shows of every benchmark."""
        wanted = {column for run in self.runs for column in run.headlines}
        return [column for column in self.columns if column in wanted]

    @property
    def primary(self) -> list[Column]:
        """The first headline of every benchmark that has better and worse values."""
        better = {column for run in self.runs for column in run.better}
        first: dict[str, Column] = {}
        for run in self.runs:
            for column in run.headlines:
                if column in better:
                    first.setdefault(column[0], column)
        return list(first.values())

    def side(self, column: Column) -> Side:
        """Which values of a headline are better."""
        return next((run.better[column] for run in self.runs if column in run.better), None)
