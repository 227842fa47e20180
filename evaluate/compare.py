"""One run against another on the same questions, and two methods over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np

from fedcmp.evaluate.benchmarks.base import OF_THE_ANSWERS, Answers, AskedItem, Benchmark, Item
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.scoring import Given, given, rules_of
from fedcmp.evaluate.statistics import Gap, gap, holm, mcnemar, pooled, value_of
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import Work, benchmarks_of, recall
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.run_folder import Run

# With fewer draws p wanders, and its floor survives no correction over many rows.
DRAWS = 20_000
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
        UserError: There are no pairs, pairs differ in more than the seed, or answers are missing.
    """
    if len(experiments) < 2 or len(experiments) % 2:
        raise UserError(
            f"{len(experiments)} runs do not form pairs; give a run and the one it is compared with"
        )
    pairs = list(zip(experiments[::2], experiments[1::2], strict=True))
    trained = [trained_run(experiment, asking=False) for experiment in experiments]
    _require_seeds(pairs, trained)
    rows = [row for name in benchmarks_of(experiments[0], only) for row in _benchmark(name, pairs, trained)]
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
        f"p: paired bootstrap over images, {draws_of(experiments):,} draws; Holm: adjusted for all rows; "
        "McNemar: exact, takes questions about one image as independent. The interval says nothing about "
        "other seeds."
    )
    return rows


def draws_of(experiments: Sequence[Experiment]) -> int:
    """Resamples of a comparison."""
    return max(DRAWS, experiments[0].evaluate.bootstrap)


def _require_seeds(pairs: Sequence[tuple[Experiment, Experiment]], trained: Sequence[Run]) -> None:
    """Several pairs are seeds of one comparison, and of nothing else.

    Raises:
        UserError: A side has another configuration than before, or a seed twice or unpaired.
    """
    if len(pairs) == 1:
        return
    for side in (0, 1):
        runs, theirs = [pair[side] for pair in pairs], trained[side::2]
        for run, each in zip(runs[1:], theirs[1:], strict=True):
            found = differences(_method(theirs[0]), _method(each))
            if found:
                raise UserError(
                    f"'{runs[0].run}' and '{run.run}' are not seeds of one method ({'; '.join(found)}); "
                    "compare them pair by pair"
                )
        seeds = [run.seed for run in runs]
        if len({*seeds}) < len(seeds):
            raise UserError(f"seeds {', '.join(map(str, seeds))} of '{runs[0].run}': each may come once")
    for ours, other in pairs:
        if ours.seed != other.seed:
            raise UserError(
                f"'{ours.run}' has seed {ours.seed} and '{other.run}' seed {other.seed}; of several pairs "
                "each must have one seed"
            )


def _method(run: Run) -> dict[str, Any]:
    """What a run is besides its seed."""
    identity = {name: value for name, value in run.identity.items() if name != "seed"}
    return {**identity, "encoding": run.manifest["features"]["key"]}


def _require_rules(name: str, works: Sequence[Work], runs: Sequence[Experiment]) -> None:
    """All runs answered under the same conditions.

    Raises:
        UserError: Benchmarks of one name have other options.
    """
    conditions = [
        {
            **rules_of(work.benchmark, [])["options"],
            **{option: getattr(work.benchmark, option) for option in OF_THE_ANSWERS},
            "limit": work.limit,
            **run.evaluate.benchmarks[name].provenance,
        }
        for work, run in zip(works, runs, strict=True)
    ]
    for run, options in zip(runs[1:], conditions[1:], strict=True):
        found = differences(conditions[0], options)
        if found:
            raise UserError(
                f"benchmark '{name}' of '{runs[0].run}' and '{run.run}' is not the same "
                f"({'; '.join(found)}); evaluate both with one configuration"
            )


@dataclass(frozen=True)
class Answered:
    """A run's answers to one benchmark."""

    experiment: Experiment
    work: Work
    given: Given
    _scored: dict[str, list[dict[str, Metric]]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The run's."""
        return self.experiment.run

    def metrics(self, items: Sequence[Item]) -> list[dict[str, Metric]]:
        """Metrics of some of its items, for each projector that it is judged by."""
        key = fingerprint([item.id for item in items])
        if key not in self._scored:
            self._scored[key] = [self.work.benchmark.score(items, each) for each in self.given.answers]
        return self._scored[key]


def _benchmark(
    name: str, pairs: Sequence[tuple[Experiment, Experiment]], trained: Sequence[Run]
) -> list[Row]:
    runs = [experiment for pair in pairs for experiment in pair]
    works = [recall(run, name, benchmarks_of(run, (name,))[name]) for run in runs]
    found = [
        Answered(run, work, given(run, one, work))
        for run, one, work in zip(runs, trained, works, strict=True)
    ]
    rows, dropped = differences_of(name, found)
    if works[0].limit is not None:
        say(f"{name}: LIMITED to the first {works[0].limit} questions")
    if dropped:
        say(f"{name}: {dropped} questions that not all runs answered are left out")
    return rows


def differences_of(name: str, answered: Sequence[Answered]) -> tuple[list[Row], int]:
    """A row for each headline of one benchmark, on the questions that all runs answered.

    Args:
        name: The benchmark's name.
        answered: A run of the first method, one of the second, and so on, a pair a seed.

    Returns:
        The rows, and how many questions were left out because not all runs answered them.

    Raises:
        UserError: Questions, labels, rules or conditions differ, or there is no question in common.
    """
    runs, works = [each.experiment for each in answered], [each.work for each in answered]
    _require_rules(name, works, runs)
    common: dict[str, Item] = {item.id: item for item in answered[0].given.items}
    for each in answered[1:]:
        theirs = {item.id: item for item in each.given.items}
        other = [key for key, item in common.items() if key in theirs and not _same(theirs[key], item)]
        if other:
            raise UserError(
                f"benchmark '{name}': {len(other)} questions or labels of '{runs[0].run}' and '{each.name}' "
                f"differ under one id (first: '{other[0]}'); evaluate both with the same files"
            )
        common = {key: item for key, item in common.items() if key in theirs}
    if not common:
        raise UserError(f"benchmark '{name}': the runs have no question in common")
    items = list(common.values())
    benchmark = works[0].benchmark
    by_run = [each.metrics(items) for each in answered]
    rows = []
    for metric in (each for each in by_run[0][0] if each in benchmark.headlines):
        by_seed = [pooled([scores[metric] for scores in run]) for run in by_run]
        values = [value_of(each) for each in by_seed]
        generator = np.random.default_rng(runs[0].seed)
        difference = gap(by_seed[::2], by_seed[1::2], generator, draws_of(runs))
        differences = np.subtract(values[::2], values[1::2]).tolist()
        exact = _exact(benchmark, items, [one for each in answered for one in each.given.answers], values)
        rows.append(
            Row(
                f"{name}: {metric}",
                fmean(values[::2]),
                fmean(values[1::2]),
                difference,
                stdev(differences) if len(differences) > 1 else None,
                exact,
                len(items),
            )
        )
    return rows, max(len(work.items) for work in works) - len(common)


def _same(one: Item, other: Item) -> bool:
    """Whether two questions of one id are the same, with the same label."""
    recalled = isinstance(one, AskedItem) or isinstance(other, AskedItem)
    labels = recalled or (one.label, one.options) == (other.label, other.options)
    return labels and (one.image, one.digest) == (other.image, other.digest)


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
