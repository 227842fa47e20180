"""One run's answers and scores: saved answers first, scores from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.answers import Saved, answers_path, begin_answers, read_answers
from evaluate.benchmarks.base import BENCHMARKS, Benchmark, Item, Problem
from evaluate.compare import interval, pooled
from pipeline.cache import FeatureCache, open_cache
from pipeline.config import Experiment
from pipeline.console import progress, say, table
from pipeline.errors import UserError, did_you_mean
from pipeline.identity import language_identity, run_differences, run_identity
from pipeline.manifest import fingerprint, locked, read_json, write_atomic, write_json

FORMAT = {"name": "fedcmp-scores", "version": 2}
_PROBLEMS_SHOWN = 3


@dataclass(frozen=True)
class Work:
    """One benchmark of one run: what to answer and where answers and scores go.

    `rows` are the cache rows of images by name. `missing` counts items whose image has no cached
    features, `duplicates` items whose id came before; neither is answered or scored, nor are the
    `problems`, entries of the files that cannot be asked.
    """

    name: str
    benchmark: Benchmark
    cache: FeatureCache
    items: list[Item]
    rows: dict[str, int]
    missing: int
    duplicates: int
    problems: list[str]


def benchmarks_of(experiment: Experiment, only: tuple[str, ...] = ()) -> dict[str, Benchmark]:
    """The configured benchmarks, by name.

    Raises:
        UserError: None is configured, or a name is unknown.
    """
    components = experiment.evaluate.benchmarks
    if not components:
        raise UserError("evaluate.benchmarks is empty; add a table [evaluate.benchmarks.NAME]")
    for name in only:
        if name not in components:
            raise UserError(f"--benchmark {name}: not configured{did_you_mean(name, components)}")
    return {
        name: BENCHMARKS.build(component, f"evaluate.benchmarks.{name}")
        for name, component in components.items()
        if not only or name in only
    }


def prepare(experiment: Experiment, name: str, benchmark: Benchmark) -> Work:
    """Read a benchmark's files and match its images with the cache."""
    cache = open_cache(experiment, _silo_of(experiment, name, benchmark))
    rows = {image: row for row, image in enumerate(cache.ids) if cache.status[row] == 0}
    found = benchmark.items(cache)
    problems = [each.reason for each in found if isinstance(each, Problem)]
    listed = [each for each in found if isinstance(each, Item)]
    if not listed:
        why = f"; {problems[0]}" if problems else ""
        raise UserError(f"benchmark '{name}': its files hold no question{why}")
    unique: dict[str, Item] = {}
    for item in listed:
        unique.setdefault(item.id, item)
    items = [item for item in unique.values() if item.image in rows]
    if not items:
        example = next(iter(unique.values())).image
        raise UserError(
            f"benchmark '{name}': none of its images (first: '{example}') is in {cache.path}; "
            f"extract them: fedcmp extract CONFIG --benchmark {name} --images FOLDER"
        )
    missing, duplicates = len(unique) - len(items), len(listed) - len(unique)
    return Work(name, benchmark, cache, items, rows, missing, duplicates, problems)


def _silo_of(experiment: Experiment, name: str, benchmark: Benchmark) -> str:
    """The silo a benchmark names, else a cache of its own, else the one of all benchmarks."""
    own = name if experiment.cache_path(name).exists() else None
    silo = benchmark.silo or own or experiment.evaluate.silo
    if silo is None:
        raise UserError(
            f"benchmark '{name}' has no cached images; extract them: fedcmp extract CONFIG "
            f"--benchmark {name} --images FOLDER"
        )
    return silo


def key_of(experiment: Experiment, work: Work, manifest: dict[str, Any], projector: str) -> dict[str, Any]:
    """What a projector's answers depend on, as JSON."""
    language = experiment.language
    return {
        "projector": manifest["projectors"][projector],
        "language": language_identity(experiment),
        "template": language.template if work.benchmark.asks == "caption" else language.question_template,
        "max_length": language.max_length,
        "mode": work.benchmark.mode,
        "max_new_tokens": work.benchmark.max_new_tokens,
        "features": work.cache.content,
        "items": fingerprint([_asked(item, work.benchmark) for item in work.items]),
    }


def keys_of(experiment: Experiment, work: Work, manifest: dict[str, Any]) -> list[str]:
    """Fingerprints of the keys of all projectors that a run is judged by."""
    return [fingerprint(key_of(experiment, work, manifest, name)) for name in judged(manifest)]


def _asked(item: Item, benchmark: Benchmark) -> list[Any]:
    """Everything about an item that decides its answer."""
    asked = [item.id, item.image, item.text.encode().decode()]
    if benchmark.mode == "rank":
        return [*asked, *item.options]
    return [*asked, item.reference] if benchmark.mode == "retrieve" else asked


def judged(manifest: dict[str, Any]) -> list[str]:
    """The projectors a run is judged by: its silos' own where it has such, else the global one."""
    names = list(manifest["projectors"])
    return [name for name in names if name.startswith("silos/")] or names


def read_manifest(experiment: Experiment) -> dict[str, Any]:
    """The finished run's manifest.

    Raises:
        UserError: The run is not finished, or was trained with another configuration or LLM.
    """
    path = experiment.run_path
    manifest: dict[str, Any] | None = read_json(path / "manifest.json")
    if manifest is None:
        raise UserError(f"{path}: no finished run here; run 'fedcmp federate' first")
    changed = run_differences(run_identity(experiment), manifest.get("identity", {}))
    if changed:
        raise UserError(
            f"{path}: trained with another configuration ({'; '.join(changed)}); run 'fedcmp federate' again"
        )
    return manifest


def require_encoding(experiment: Experiment, cache: FeatureCache, manifest: dict[str, Any]) -> None:
    """A run sees only features such as those it was trained on.

    Raises:
        UserError: The cache's are others.
    """
    if cache.cache_key != manifest["cache_key"]:
        raise UserError(
            f"{cache.path}: encoded in another way than the silos of {experiment.run_path}; "
            "extract it with the run's configuration"
        )


def evaluate_runs(experiments: Sequence[Experiment], only: tuple[str, ...]) -> None:
    """Answer what is not yet answered, score, and print the scores, run by run."""
    for experiment in experiments:
        evaluate_run(experiment, only)


def evaluate_run(experiment: Experiment, only: tuple[str, ...]) -> None:
    """Answer what is not yet answered, score, and print the scores."""
    manifest = read_manifest(experiment)
    works = [prepare(experiment, name, b) for name, b in benchmarks_of(experiment, only).items()]
    for work in works:
        require_encoding(experiment, work.cache, manifest)
    pending = []
    for work in works:
        for projector in judged(manifest):
            key = key_of(experiment, work, manifest, projector)
            path = answers_path(experiment.scores_path, work.name, projector, key)
            saved = read_answers(path)
            left = [item for item in work.items if not saved.knows(item.id)]
            if left:
                begin_answers(path, key)
                # What is retrieved depends on all the rest.
                todo = work.items if work.benchmark.mode == "retrieve" else left
                pending.append((work, projector, todo, path))
    if pending:
        with locked(experiment.scores_path / ".lock", str(experiment.scores_path)):
            _answer(experiment, pending)
    else:
        say(f"{experiment.run}: nothing to answer, every answer is saved")
    _score(experiment, manifest, works)


def _answer(experiment: Experiment, pending: list[tuple[Work, str, list[Item], Path]]) -> None:
    from evaluate.reader import answer, load_reader

    total = sum(len(left) for _, _, left, _ in pending)
    with progress(f"{experiment.run}: answers", total, "answers") as task:
        for work, name, left, path in pending:
            reader = load_reader(experiment, name, work.cache)
            answer(work.benchmark, left, work.rows, reader, path, task.advance)


def score_runs(experiments: Sequence[Experiment], only: tuple[str, ...]) -> None:
    """Score saved answers again.

    Raises:
        UserError: Answers are missing.
    """
    for experiment in experiments:
        works = [prepare(experiment, name, b) for name, b in benchmarks_of(experiment, only).items()]
        _score(experiment, read_manifest(experiment), works)


def saved_answers(experiment: Experiment, work: Work, manifest: dict[str, Any]) -> list[tuple[str, Saved]]:
    """The fingerprint of the key and the answers of every projector the run is judged by.

    Raises:
        UserError: Answers are missing, or none could be given.
    """
    found = []
    for projector in judged(manifest):
        key = key_of(experiment, work, manifest, projector)
        saved = read_answers(answers_path(experiment.scores_path, work.name, projector, key))
        missing = sum(not saved.knows(item.id) for item in work.items)
        if missing:
            raise UserError(
                f"{experiment.run}, {work.name}: {missing} answers are missing; run 'fedcmp evaluate' first"
            )
        if not saved.answers:
            reason = next(iter(saved.failures.values()))
            raise UserError(f"{experiment.run}, {work.name}: no question could be answered: {reason}")
        found.append((fingerprint(key), saved))
    return found


def answered(work: Work, saved: Sequence[Saved]) -> list[Item]:
    """The items that every projector could answer."""
    return [item for item in work.items if all(item.id in each.answers for each in saved)]


def _score(experiment: Experiment, manifest: dict[str, Any], works: list[Work]) -> None:
    rows = []
    for work in works:
        keys, saved = zip(*saved_answers(experiment, work, manifest), strict=True)
        items = answered(work, saved)
        by_projector = [work.benchmark.score(items, each.answers) for each in saved]
        generator = np.random.default_rng(experiment.seed)
        resamples = experiment.evaluate.bootstrap
        scores = {
            name: interval(pooled([metrics[name] for metrics in by_projector]), generator, resamples)
            for name in by_projector[0]
        }
        content = {
            "format": FORMAT,
            "experiment": experiment.experiment,
            "run": experiment.run,
            "strategy": manifest["strategy"],
            "benchmark": work.name,
            "rules": [work.benchmark.__class__.__name__, work.benchmark.version],
            "settings": work.benchmark.settings,
            "answers": list(keys),
            "counts": _counts(work, items, saved),
            "headlines": [name for name in scores if name in work.benchmark.headlines],
            "metrics": {name: asdict(score) for name, score in scores.items()},
        }
        path = experiment.scores_path / f"{work.name}.json"
        if read_json(path) != content:
            write_json(path, content)
        rows += [
            [f"{work.name}: {name}", f"{s.value:.3f}", f"{s.low:.3f} - {s.high:.3f}", str(s.n)]
            for name, s in scores.items()
        ]
        _say_counts(work, content["counts"], saved)
        if len(saved) == 1:
            _submit(experiment, work, items, saved[0])
    table(f"Scores of {experiment.run}", ["metric", "value", "95 % interval", "n"], rows)
    say(f"Answers and scores in {experiment.scores_path}")


def _counts(work: Work, items: Sequence[Item], saved: Sequence[Saved]) -> dict[str, int]:
    """What was scored and what was not, over all projectors."""
    known = {item.id for item in work.items}
    return {
        "items": len(items),
        "missing images": work.missing,
        "duplicate ids": work.duplicates,
        "bad entries": len(work.problems),
        "failed items": len(work.items) - len(items),
        "empty answers": sum(each.answers[item.id] == "" for each in saved for item in items),
        "unreadable lines": sum(each.unreadable for each in saved),
        "extra answers": sum(name not in known for each in saved for name in each.answers),
        "projectors": len(saved),
    }


def _say_counts(work: Work, counts: dict[str, int], saved: Sequence[Saved]) -> None:
    for what in ("missing images", "duplicate ids", "bad entries", "failed items", "extra answers"):
        if counts[what]:
            say(f"{work.name}: {counts[what]} {what} not scored")
    if counts["empty answers"]:
        say(f"{work.name}: {counts['empty answers']} empty answers, scored by the rule as they are")
    if counts["unreadable lines"]:
        say(f"{work.name}: {counts['unreadable lines']} unreadable lines among the answers, answered again")
    reasons = [f"{name}: {why}" for each in saved for name, why in each.failures.items()]
    for reason in [*work.problems, *reasons][:_PROBLEMS_SHOWN]:
        say(f"  {reason}")


def _submit(experiment: Experiment, work: Work, items: Sequence[Item], saved: Saved) -> None:
    """Write the files for the official evaluation."""
    for name, data in work.benchmark.submissions(items, saved.answers).items():
        path = experiment.scores_path / "submissions" / f"{work.name}{Path(name).suffix}"
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
        say(f"{work.name}: for the official evaluation: {path}")
