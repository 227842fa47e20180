"""Scores from saved answers, with all that they were made of, so that stale ones are detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.evaluate.answers import answers_path, read_answers
from fedcmp.evaluate.benchmarks.base import OF_THE_ANSWERS, Answers, Benchmark, Item
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.statistics import interval, pooled
from fedcmp.evaluate.work import Work
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_atomic, write_json
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.plugins import blamed
from fedcmp.pipeline.run_folder import PROJECTOR, Run, own_projector

FORMAT = {"name": "fedcmp-scores", "version": 3}
_ELSEWHERE = {"silo", "silos", "images", *OF_THE_ANSWERS}


@dataclass(frozen=True)
class Given:
    """Answers of the projectors that a run is judged by.

    Attributes:
        items: Those that every projector could answer.
        answers: By item id, for each projector.
        projectors: Their files' names.
        reasons: Why others have no answer.
    """

    items: list[Item]
    answers: list[Answers]
    projectors: list[str]
    reasons: list[str]


@dataclass(frozen=True)
class Scored:
    """The content of a file of scores, what goes to official evaluations, and why items failed."""

    content: dict[str, Any]
    submissions: dict[str, bytes]
    reasons: list[str]


def model_of(run: Run, projector: str) -> dict[str, Any]:
    """What gives the answers: the content of projector and adapter, and the LLM."""
    language = run.identity["language"]
    kept = {name: value for name, value in language.items() if name not in ("template", "max_length")}
    besides = {"adapter": run.adapters.get(projector), "own part": run.own_part(projector)}
    besides = {name: content for name, content in besides.items() if content is not None}
    return {"projector": run.projectors[projector], **besides, "language": kept}


def judged(run: Run, work: Work) -> list[str]:
    """The projectors that answer a benchmark: of several those of its silos.

    Raises:
        UserError: It names a silo that has none.
    """
    silos = work.benchmark.silos
    if not silos or run.judged == [PROJECTOR]:
        return run.judged
    strangers = [silo for silo in silos if own_projector(silo) not in run.judged]
    if strangers:
        raise UserError(
            f"evaluate.benchmarks.{work.name}.silos: {', '.join(strangers)} have no projectors in "
            f"{run.path}; name silos of the run"
        )
    return [name for name in run.judged if name in map(own_projector, silos)]


def given(experiment: Experiment, run: Run, work: Work) -> Given:
    """Saved answers.

    Raises:
        UserError: Answers are missing, or none could be given.
    """
    place, mode = f"{experiment.run}, {work.name}", work.benchmark.mode
    answers: list[Answers] = []
    reasons: list[str] = []
    projectors = judged(run, work)
    for projector in projectors:
        model = model_of(run, projector)
        saved = read_answers(answers_path(experiment.scores_path, projector, model), model)
        missing = sum(not saved.knows(key, mode) for key in work.keys.values())
        if missing:
            raise UserError(f"{place}: {missing} answers are missing; run 'fedcmp evaluate' first")
        answers.append(
            {name: saved.answers[key] for name, key in work.keys.items() if key not in saved.failures}
        )
        reasons += [
            f"{name}: {saved.failures[key]}" for name, key in work.keys.items() if key in saved.failures
        ]
        if not answers[-1]:
            raise UserError(f"{place}: no question could be answered: {reasons[0]}")
    items = [item for item in work.items if all(item.id in each for each in answers)]
    return Given(items, answers, projectors, reasons)


def made_of(experiment: Experiment, work: Work, given: Given) -> dict[str, Any]:
    """What scores are made of, as JSON: equal values have equal scores."""
    return {
        **rules_of(work.benchmark, given.items),
        **experiment.evaluate.benchmarks[work.name].provenance,
        "bootstrap": experiment.evaluate.bootstrap,
        "seed": experiment.seed,
        "answers": fingerprint([[each[item.id] for item in given.items] for each in given.answers]),
    } | ({} if work.limit is None else {"limit": work.limit})


def rules_of(benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Any]:
    """What turns answers into scores: questions, labels, the version of the rules, and options."""
    options = benchmark.model_dump(mode="json", exclude=_ELSEWHERE)
    labels = [item.digest if benchmark.asks_cache else item.label for item in items]
    # Files count by what is in them.
    kinds = {name: str(field.annotation) for name, field in type(benchmark).model_fields.items()}
    rules = {
        "questions": fingerprint([[item.id, item.image] for item in items]),
        "labels": fingerprint([labels, benchmark.evidence()]),
        "rules": f"{type(benchmark).__name__} {benchmark.version}",
        "options": {name: value for name, value in options.items() if "Path" not in kinds[name]},
    }
    # Scores from before there was such a choice are of the usual words.
    return rules | ({"wording": benchmark.wording} if benchmark.wording else {})


def _require_form(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[Mapping[str, Metric]]
) -> None:
    """Refuse what is no score of these items.

    Raises:
        TypeError: A metric is none, has another number of items, or a headline is no metric.
    """
    for metrics in scores:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"score returned {type(metric).__name__} for '{name}', not Metric")
            if len(metric.images) != len(metric.statistics):
                given = f"{len(metric.statistics)} values for {len(metric.images)} images"
                raise TypeError(f"metric '{name}' has {given}; give one for each item")
        missing = [name for name in benchmark.headlines if metrics and name not in metrics]
        if missing and not any(name in metrics for name in benchmark.headlines):
            raise TypeError(f"headlines name '{missing[0]}', and score returned {', '.join(metrics)}")


def score(experiment: Experiment, run: Run, work: Work) -> Scored:
    """Score saved answers.

    Raises:
        UserError: Answers are missing.
    """
    found, benchmark = given(experiment, run, work), work.benchmark
    with blamed(benchmark, f"benchmark '{work.name}'"):
        by_projector = [benchmark.score(found.items, each) for each in found.answers]
        _require_form(benchmark, found.items, by_projector)
    generator = np.random.default_rng(experiment.seed)
    resamples = experiment.evaluate.bootstrap
    scores = {
        name: interval(pooled([metrics[name] for metrics in by_projector]), generator, resamples)
        for name in by_projector[0]
    }
    remarks, warnings = _remarks(benchmark, found)
    content = {
        "format": FORMAT,
        "experiment": experiment.experiment,
        "run": experiment.run,
        "strategy": run.manifest["strategy"],
        "benchmark": work.name,
        "made_of": made_of(experiment, work, found),
        "settings": _settings(work),
        "counts": _counts(work, found),
        "remarks": remarks,
        "warnings": warnings,
        "headlines": [name for name in scores if name in benchmark.headlines],
        "metrics": {name: asdict(each) for name, each in scores.items()},
    }
    one = len(found.answers) == 1
    submissions = benchmark.submissions(found.items, found.answers[0]) if one else {}
    return Scored(content, submissions, found.reasons)


def write_scores(experiment: Experiment, work: Work, scored: Scored) -> list[Path]:
    """Write scores, and the files for official evaluations, whose paths are returned."""
    path = experiment.scores_path / f"{work.name}.json"
    if read_json(path) != scored.content:
        write_json(path, scored.content)
    written = []
    for name, data in scored.submissions.items():
        path = experiment.scores_path / "submissions" / f"{work.name}{Path(name).suffix}"
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
        written.append(path)
    return written


def read_scores(experiment: Experiment, run: Run, work: Work) -> dict[str, Any]:
    """Scores that fit questions, labels, rules, options, bootstrap and answers as they are now.

    Raises:
        UserError: They do not, naming what differs.
    """
    content: dict[str, Any] = read_json(experiment.scores_path / f"{work.name}.json")
    place = f"run '{experiment.run}': its scores of '{work.name}'"
    if content.get("format") != FORMAT:
        raise UserError(f"{place} are of another version of fedcmp; run 'fedcmp evaluate' again")
    now = made_of(experiment, work, given(experiment, run, work))
    changed = _changes(now, content["made_of"])
    if changed:
        raise UserError(f"{place} are stale ({'; '.join(changed)}); run 'fedcmp score' again")
    return content


def _changes(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What differs, in words; other questions have other labels and answers, of course."""
    hashed = [what for what in ("questions", "labels", "answers") if now[what] != then[what]]
    told = [f"other {what}" for what in (hashed[:1] if "questions" in hashed else hashed)]
    ours, theirs = (
        {name: value for name, value in each.items() if name not in ("questions", "labels", "answers")}
        for each in (now, then)
    )
    return told + differences(ours, theirs)


def _settings(work: Work) -> dict[str, str]:
    """What the scores must not be quoted without."""
    part = {} if work.limit is None else {"LIMITED": f"only the first {work.limit} questions"}
    return part | work.benchmark.settings | work.benchmark.wording


def _counts(work: Work, found: Given) -> dict[str, int]:
    """What was scored and what was not, over all projectors."""
    return {
        "items": len(found.items),
        "missing images": len(work.missing),
        "duplicate ids": work.duplicates,
        "bad entries": len(work.problems),
        "failed items": len(work.items) - len(found.items),
        "images trained on": work.trained,
        "empty answers": sum(each[item.id] == "" for each in found.answers for item in found.items),
        "projectors": len(found.answers),
    }


def _remarks(benchmark: Benchmark, found: Given) -> tuple[dict[str, int], list[str]]:
    """The benchmark's remarks on every projector's answers, counts summed."""
    counts: dict[str, int] = {}
    warnings = []
    for each in found.answers:
        said = [str(each[item.id]) for item in found.items]
        numbers, warning = benchmark.remarks(said)
        for what, number in numbers.items():
            counts[what] = counts.get(what, 0) + number
        warnings += [warning] if warning else []
    return counts, list(dict.fromkeys(warnings))
