"""Scores by silo, domain or part, wherever answers know it.

Four things can say where a question is from: the projector that answered it (`local_only`), the silo that a
benchmark names for its images, the folder of its image (`fedcmp cache merge --prefix` puts silos there), and
the benchmark's own parts, whose figures are called `<headline> <part>`. Benchmarks that are for some silos
alone are these silos' tasks; their chief figures stand together, apart from losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np

from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.report.judged import Judged
from fedcmp.evaluate.report.results import PART, Column, Grouped, Score, Side
from fedcmp.evaluate.statistics import interval, pooled

# More folders than these are how files were stored.
_MOST = 48


def grouped(runs: Sequence[Judged]) -> list[Grouped]:
    """Every headline by every kind of group that the runs have."""
    found: dict[tuple[str, Column], Grouped] = {}

    for run in runs:
        for benchmark, metric in run.result.headlines:
            better = run.result.better.get((benchmark, metric))

            def add(
                what: str,
                scores: Mapping[str, Score],
                column: Column,
                run: Judged = run,
                better: Side = better,
            ) -> None:
                made = found.setdefault((what, column), Grouped(column, what, better, {}))
                for group, score in scores.items():
                    made.scores.setdefault(group, {})[run.result.name] = score

            column = (benchmark, metric)
            add("own projector", _own_projectors(run, *column), column)
            add("folder of the images", _folders(run, *column), column)
            add(PART, _parts(run, *column), column)
            chief = next(each for name, each in run.result.headlines if name == benchmark)
            if run.benchmarks[benchmark].silos and metric == chief:
                score = run.result.scores[benchmark][metric]
                figure = "loss" if better == "lower" else "score"
                add("task", {f"{benchmark}: {metric}": score}, ("own tasks", figure))
            silo = run.benchmarks[benchmark].silo
            if silo is not None:
                kind = run.experiment.evaluate.benchmarks[benchmark].name
                score = run.result.scores[benchmark][metric]
                add("silo of the images", {silo: score}, (kind, metric))
    return [each for each in found.values() if len(each.scores) > 1]


def _own_projectors(run: Judged, benchmark: str, metric: str) -> dict[str, Score]:
    """Scores of silos' own projectors, where the run is judged by several."""
    answered = run.answered[benchmark]
    if len(answered.given.projectors) < 2:
        return {}
    scored = answered.metrics(answered.given.items)
    return {
        Path(name).stem: _interval(run, metrics[metric])
        for name, metrics in zip(answered.given.projectors, scored, strict=True)
    }


def _folders(run: Judged, benchmark: str, metric: str) -> dict[str, Score]:
    """Scores by the first folder in which images' names differ."""
    answered = run.answered[benchmark]
    whole = pooled([metrics[metric] for metrics in answered.metrics(answered.given.items)])
    if not whole.divisible:
        return {}
    folder = _folder_of(whole.images)
    places: dict[str, list[int]] = {}
    for place, image in enumerate(whole.images):
        places.setdefault(folder[image], []).append(place)
    if not 2 <= len(places) <= _MOST:
        return {}
    return {group: _interval(run, _some(whole, places[group])) for group in sorted(places)}


def _folder_of(images: Sequence[str]) -> dict[str, str]:
    parts = {image: PurePosixPath(image).parent.parts for image in images}
    depth = 0
    for same in zip(*parts.values(), strict=False):
        if len({*same}) > 1:
            break
        depth += 1
    return {image: each[depth] if len(each) > depth else "(none)" for image, each in parts.items()}


def _some(metric: Metric, places: Sequence[int]) -> Metric:
    """A metric of some of its rows."""
    strata = [metric.strata[place] for place in places] if metric.strata else None
    images = [metric.images[place] for place in places]
    return Metric(images, metric.statistics[np.array(places)], metric.value, strata)


def _parts(run: Judged, benchmark: str, metric: str) -> dict[str, Score]:
    """Figures that the benchmark has for each of its parts."""
    scores, start = run.result.scores[benchmark], f"{metric} "
    return {name.removeprefix(start): each for name, each in scores.items() if name.startswith(start)}


def _interval(run: Judged, metric: Metric) -> Score:
    generator = np.random.default_rng(run.experiment.seed)
    return asdict(interval(metric, generator, run.experiment.evaluate.bootstrap))
