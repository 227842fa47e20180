"""One run's answers and scores: saved answers first, scores from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.answers import answers_path, begin_answers, read_answers
from evaluate.benchmarks.base import BENCHMARKS, Answer, Benchmark, Item
from evaluate.compare import interval, pooled
from pipeline.cache import FeatureCache, differences, open_cache
from pipeline.config import Experiment
from pipeline.console import progress, say, table
from pipeline.device import pick_device
from pipeline.errors import UserError, did_you_mean
from pipeline.identity import language_identity, language_options, run_identity
from pipeline.manifest import fingerprint, locked, read_json, write_json

FORMAT = {"name": "fedcmp-scores", "version": 1}


@dataclass(frozen=True)
class Work:
    """One benchmark of one run: what to answer and where answers and scores go.

    `rows` are the cache rows of images by name. `missing` counts items whose image has no cached
    features, `duplicates` items whose id came before; neither is answered or scored.
    """

    name: str
    benchmark: Benchmark
    cache: FeatureCache
    items: list[Item]
    rows: dict[str, int]
    missing: int
    duplicates: int


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
    silo = benchmark.silo or experiment.evaluate.silo
    if silo is None:
        raise UserError(f"evaluate.benchmarks.{name}.silo is missing; name the silo of its images")
    cache = open_cache(experiment, silo)
    rows = {image: row for row, image in enumerate(cache.ids) if cache.status[row] == 0}
    unique: dict[str, Item] = {}
    listed = benchmark.items(cache)
    for item in listed:
        unique.setdefault(item.id, item)
    items = [item for item in unique.values() if item.image in rows]
    if not unique:
        raise UserError(f"benchmark '{name}': its files hold no question")
    if not items:
        example = next(iter(unique.values())).image
        raise UserError(
            f"benchmark '{name}': none of its images (first: '{example}') is in {cache.path}; "
            "extract the silo that holds them"
        )
    return Work(name, benchmark, cache, items, rows, len(unique) - len(items), len(listed) - len(unique))


def key_of(experiment: Experiment, work: Work, manifest: dict[str, Any], projector: str) -> dict[str, Any]:
    """What a projector's answers depend on, as JSON."""
    language = experiment.language
    return {
        "projector": manifest["projectors"][projector],
        "language": language_identity(experiment),
        "template": language.template if work.benchmark.asks == "caption" else language.question_template,
        "max_length": language.max_length,
        "max_new_tokens": work.benchmark.max_new_tokens,
        "features": work.cache.content,
        "items": fingerprint([[item.id, item.image, item.text.encode().decode()] for item in work.items]),
    }


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
    ours = run_identity(experiment)
    trained = {name: manifest.get("identity", {}).get(name) for name in ours}
    changed = differences(ours, trained)
    if changed:
        raise UserError(
            f"{path}: trained with another configuration ({'; '.join(changed)}); run 'fedcmp federate' again"
        )
    return manifest


def evaluate_run(experiment: Experiment, only: tuple[str, ...]) -> None:
    """Answer what is not yet answered, score, and print the scores."""
    manifest = read_manifest(experiment)
    works = [prepare(experiment, name, b) for name, b in benchmarks_of(experiment, only).items()]
    for work in works:
        if work.cache.cache_key != manifest["cache_key"]:
            raise UserError(
                f"{work.cache.path}: encoded in another way than the silos of {experiment.run_path}; "
                "extract it with the run's configuration"
            )
    pending = []
    for work in works:
        for projector in judged(manifest):
            key = key_of(experiment, work, manifest, projector)
            path = answers_path(experiment.scores_path, work.name, projector, key)
            done = read_answers(path)
            left = [item for item in work.items if item.id not in done]
            if left:
                begin_answers(path, key)
                pending.append((work, projector, left, path))
    if pending:
        with locked(experiment.scores_path / ".lock", str(experiment.scores_path)):
            _answer(experiment, pending)
    else:
        say(f"{experiment.run}: nothing to answer, every answer is saved")
    _score(experiment, manifest, works)


def _answer(experiment: Experiment, pending: list[tuple[Work, str, list[Item], Path]]) -> None:
    from evaluate.reader import Reader, answer
    from pipeline.language import load_language
    from pipeline.projector import load_projector

    options = experiment.language
    device = pick_device(experiment.device)
    language = load_language(options.path, **language_options(experiment))
    total = sum(len(left) for _, _, left, _ in pending)
    with progress(f"{experiment.run}: answers", total, "answers") as task:
        for work, name, left, path in pending:
            projector, _ = load_projector(experiment.run_path / name)
            reader = Reader(
                language,
                projector.to(device).eval(),
                work.cache,
                options.template,
                options.question_template,
                options.max_length,
                experiment.evaluate.batch_size,
            )
            answer(work.benchmark, left, work.rows, reader, path, task.advance)


def score_run(experiment: Experiment, only: tuple[str, ...]) -> None:
    """Score saved answers again.

    Raises:
        UserError: Answers are missing.
    """
    works = [prepare(experiment, name, b) for name, b in benchmarks_of(experiment, only).items()]
    _score(experiment, read_manifest(experiment), works)


def _score(experiment: Experiment, manifest: dict[str, Any], works: list[Work]) -> None:
    rows = []
    for work in works:
        by_projector = []
        keys = []
        for projector in judged(manifest):
            key = key_of(experiment, work, manifest, projector)
            saved = read_answers(answers_path(experiment.scores_path, work.name, projector, key))
            missing = sum(item.id not in saved for item in work.items)
            if missing:
                raise UserError(
                    f"{experiment.run}, {work.name}: {missing} answers are missing; "
                    "run 'fedcmp evaluate' first"
                )
            by_projector.append(work.benchmark.score(work.items, saved))
            keys.append(fingerprint(key))
        generator = np.random.default_rng(experiment.seed)
        scores = {
            name: interval(
                pooled([metrics[name] for metrics in by_projector]),
                generator,
                experiment.evaluate.bootstrap,
            )
            for name in by_projector[0]
        }
        content = {
            "format": FORMAT,
            "experiment": experiment.experiment,
            "run": experiment.run,
            "strategy": manifest["strategy"],
            "benchmark": work.name,
            "rules": [work.benchmark.__class__.__name__, work.benchmark.version],
            "answers": keys,
            "counts": {
                "items": len(work.items),
                "missing images": work.missing,
                "duplicate ids": work.duplicates,
                "projectors": len(by_projector),
            },
            "headlines": [name for name in scores if name in work.benchmark.headlines],
            "metrics": {name: asdict(score) for name, score in scores.items()},
        }
        path = experiment.scores_path / f"{work.name}.json"
        if read_json(path) != content:
            write_json(path, content)
        for name, score in scores.items():
            rows.append(
                [
                    f"{work.name}: {name}",
                    f"{score.value:.3f}",
                    f"{score.low:.3f} - {score.high:.3f}",
                    str(score.n),
                ]
            )
        for what in ("missing images", "duplicate ids"):
            if content["counts"][what]:
                say(f"{work.name}: {content['counts'][what]} {what} not scored")
    table(f"Scores of {experiment.run}", ["metric", "value", "95 % interval", "n"], rows)
    say(f"Answers and scores in {experiment.scores_path}")


def answers_of(experiment: Experiment, work: Work, manifest: dict[str, Any]) -> dict[str, Answer]:
    """Saved answers of the first projector a run is judged by, for showing."""
    projector = judged(manifest)[0]
    key = key_of(experiment, work, manifest, projector)
    return read_answers(answers_path(experiment.scores_path, work.name, projector, key))
