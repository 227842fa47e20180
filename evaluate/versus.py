"""One run against another on the same questions, and two methods over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from evaluate.benchmarks.base import Answers, Benchmark, Item, Metric
from evaluate.compare import Gap, gap, holm, mcnemar, pooled, value_of
from evaluate.run import answered, benchmarks_of, prepare, read_manifest, saved_answers
from pipeline.config import Experiment
from pipeline.console import say, table
from pipeline.errors import UserError

_COLUMNS = ("difference", "95 % over images", "p", "p (Holm)", "McNemar", "sd over seeds", "n")


@dataclass(frozen=True)
class Row:
    """One metric of two methods.

    Attributes:
        metric: `benchmark: metric`.
        ours: Value of the first method, the mean over its seeds.
        theirs: Value of the second.
        gap: Their difference, its interval over images alone.
        spread: Standard deviation of the difference over seeds, where there are several.
        mcnemar: P value of the exact test, where the metric is the share of right answers of one seed.
        n: Questions both answered.
    """

    metric: str
    ours: float
    theirs: float
    gap: Gap
    spread: float | None
    mcnemar: float | None
    n: int


def compare_runs(experiments: Sequence[Experiment], only: tuple[str, ...]) -> list[Row]:
    """Print and return the differences of two methods.

    Args:
        experiments: A run of the first method, one of the second, and so on, a pair a seed.
        only: Benchmarks to look at; all where it is empty.

    Raises:
        UserError: There are no pairs, or answers are missing.
    """
    if len(experiments) < 2 or len(experiments) % 2:
        raise UserError(f"{len(experiments)} runs are no pairs; give a run and the run it is compared with")
    pairs = list(zip(experiments[::2], experiments[1::2], strict=True))
    rows = [row for name in benchmarks_of(experiments[0], only) for row in _benchmark(name, pairs)]
    if not rows:
        raise UserError("no benchmark has references to score by; see the submission files")
    adjusted = holm([row.gap.p for row in rows])
    first, second = pairs[0]
    table(
        f"{first.run} minus {second.run}, {len(pairs)} seed{'s' if len(pairs) > 1 else ''}",
        ["metric", first.run, second.run, *_COLUMNS],
        [
            [
                row.metric,
                f"{row.ours:.3f}",
                f"{row.theirs:.3f}",
                f"{row.gap.value:+.3f}",
                f"{row.gap.low:+.3f} to {row.gap.high:+.3f}",
                f"{row.gap.p:.4f}",
                f"{p:.4f}",
                "-" if row.mcnemar is None else f"{row.mcnemar:.4f}",
                "-" if row.spread is None else f"{row.spread:.3f}",
                str(row.n),
            ]
            for row, p in zip(rows, adjusted, strict=True)
        ],
    )
    say(
        "p: paired bootstrap over images; Holm: adjusted for all rows; McNemar: exact, takes questions "
        "about one image as independent. The interval says nothing about other seeds."
    )
    return rows


def _benchmark(name: str, pairs: Sequence[tuple[Experiment, Experiment]]) -> list[Row]:
    """A row for each headline of one benchmark, on the questions that all runs answered."""
    runs = [experiment for pair in pairs for experiment in pair]
    works = [prepare(run, name, benchmarks_of(run, (name,))[name]) for run in runs]
    saved = [
        [each for _, each in saved_answers(run, work, read_manifest(run))]
        for run, work in zip(runs, works, strict=True)
    ]
    common: dict[str, Item] = {item.id: item for item in answered(works[0], saved[0])}
    for work, answers in zip(works[1:], saved[1:], strict=True):
        theirs = {item.id: item for item in answered(work, answers)}
        common = {key: item for key, item in common.items() if theirs.get(key) == item}
    if not common:
        raise UserError(f"benchmark '{name}': the runs have no question in common")
    dropped = max(len(work.items) for work in works) - len(common)
    if dropped:
        say(f"{name}: {dropped} questions that not all runs answered are left out")
    items = list(common.values())
    benchmark = works[0].benchmark
    by_run: list[list[dict[str, Metric]]] = [
        [benchmark.score(items, each.answers) for each in answers] for answers in saved
    ]
    rows = []
    for metric in (each for each in by_run[0][0] if each in benchmark.headlines):
        by_seed = [pooled([scores[metric] for scores in run]) for run in by_run]
        values = [value_of(each) for each in by_seed]
        generator = np.random.default_rng(runs[0].seed)
        found = gap(by_seed[::2], by_seed[1::2], generator, runs[0].evaluate.bootstrap)
        differences = np.subtract(values[::2], values[1::2]).tolist()
        rows.append(
            Row(
                f"{name}: {metric}",
                fmean(values[::2]),
                fmean(values[1::2]),
                found,
                stdev(differences) if len(differences) > 1 else None,
                _exact(benchmark, items, [each.answers for run in saved for each in run], values),
                len(items),
            )
        )
    return rows


def _exact(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[Answers], values: Sequence[float]
) -> float | None:
    """McNemar's p of two projectors if the metric is the share of right answers."""
    if len(answers) != 2:
        return None
    points = [benchmark.points(items, each) for each in answers]
    for worth, value in zip(points, values, strict=True):
        if worth is None or not {*worth} <= {0.0, 1.0} or not np.isclose(fmean(worth), value):
            return None
    ours, theirs = (worth or [] for worth in points)
    return mcnemar(ours, theirs)
