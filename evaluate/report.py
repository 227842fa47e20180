"""The runs of an experiment side by side: `report.html`, `report.md`, `report.json`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from evaluate.benchmarks.base import LETTER, SHORT_ANSWER, Item
from evaluate.page import RunResult, Said, Sample, page
from evaluate.run import Work, answered, benchmarks_of, keys_of, prepare, read_manifest, saved_answers
from pipeline.config import Experiment
from pipeline.console import say, table
from pipeline.errors import UserError
from pipeline.manifest import read_json, write_atomic, write_json
from pipeline.records import IMAGE_PLACEHOLDER

_SAMPLES = 24
_THUMBNAIL = 320
_SMALL_FILE = 30_000
_EXPECTED = ("items", "projectors")


def write_report(experiments: Sequence[Experiment]) -> Path:
    """Write the report of runs that are evaluated.

    Returns:
        Its directory.

    Raises:
        UserError: The runs are of several experiments, or one is not evaluated.
    """
    names = {experiment.experiment for experiment in experiments}
    if len(names) > 1:
        raise UserError(f"one report is about one experiment, these are {', '.join(sorted(names))}")
    works = [
        {name: prepare(each, name, benchmark) for name, benchmark in benchmarks_of(each).items()}
        for each in experiments
    ]
    results = [_result(*run) for run in zip(experiments, works, strict=True)]
    experiment = experiments[0]
    out = experiment.report_path
    write_json(
        out / "report.json",
        {
            "experiment": experiment.experiment,
            "runs": {
                result.name: {"strategy": result.strategy, "benchmarks": result.scores} for result in results
            },
        },
    )
    write_atomic(out / "report.md", _markdown(experiment.experiment, results).encode())
    content = page(experiment.experiment, results, columns_of(results), _samples(experiments, works))
    write_atomic(out / "report.html", content.encode())
    heads, rows = _summary(results, between="\n")
    table(f"{experiment.experiment}: value and 95 % bootstrap interval over images", heads, rows)
    say(f"Report: {out / 'report.html'}")
    return out


def _result(experiment: Experiment, works: dict[str, Work]) -> RunResult:
    manifest = read_manifest(experiment)
    scores, headlines, notes = {}, [], {}
    for name, work in works.items():
        content = read_json(experiment.scores_path / f"{name}.json")
        if content is None:
            raise UserError(f"run '{experiment.run}' has no scores of '{name}'; run 'fedcmp evaluate' first")
        if content["answers"] != keys_of(experiment, work, manifest):
            raise UserError(
                f"run '{experiment.run}' has scores of '{name}' from before it, its LLM or the questions "
                "changed; run 'fedcmp evaluate' again"
            )
        scores[name] = content["metrics"]
        headlines += [(name, metric) for metric in content["headlines"]]
        notes[name] = _note(content["settings"], content["counts"])
    lines = (experiment.run_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    return RunResult(experiment.run, manifest["strategy"], scores, headlines, notes, history)


def _note(settings: dict[str, str], counts: dict[str, int]) -> str:
    """What a score must not be quoted without, and what was not scored."""
    left_out = [f"{number} {what}" for what, number in counts.items() if what not in _EXPECTED and number]
    return "; ".join([*(f"{what}: {value}" for what, value in settings.items()), *left_out])


def columns_of(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """Every (benchmark, metric), in the order of the configuration."""
    return list(
        dict.fromkeys(
            (benchmark, metric)
            for result in results
            for benchmark, metrics in result.scores.items()
            for metric in metrics
        )
    )


def _headlines(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """What a summary shows of every benchmark."""
    wanted = {column for result in results for column in result.headlines}
    return [column for column in columns_of(results) if column in wanted]


def _cell(result: RunResult, column: tuple[str, str], between: str) -> str:
    score = result.scores.get(column[0], {}).get(column[1])
    if score is None:
        return "-"
    return f"{score['value']:.3f}{between}({score['low']:.3f}-{score['high']:.3f})"


def _summary(results: Sequence[RunResult], between: str = " ") -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the headline table."""
    columns = _headlines(results)
    heads = ["run", *(f"{benchmark}:{between}{metric}" for benchmark, metric in columns)]
    return heads, [[result.name, *(_cell(result, each, between) for each in columns)] for result in results]


def _markdown(experiment: str, results: Sequence[RunResult]) -> str:
    heads, rows = _summary(results)
    lines = [f"# {experiment}", "", "Value and 95 % bootstrap interval over images.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _samples(experiments: Sequence[Experiment], works: Sequence[dict[str, Work]]) -> list[Sample]:
    """Questions of every benchmark that is answered in words, with every run's answer."""
    samples, folders, pictures = [], set(), 0
    for name, first in works[0].items():
        benchmark = first.benchmark
        if benchmark.mode not in ("generate", "rank"):
            continue
        asked = [(run, its[name]) for run, its in zip(experiments, works, strict=True) if name in its]
        saved = [saved_answers(run, work, read_manifest(run))[0][1] for run, work in asked]
        items = answered(first, saved)
        points = [benchmark.points(items, each.answers) for each in saved]
        folder = benchmark.images or experiments[0].evaluate.images
        folders.add(folder)
        for place in _chosen(points, len(items)):
            item = items[place]
            picture = _thumbnail(folder / item.image) if folder else None
            pictures += picture is not None
            said = [
                Said(run.run, str(each.answers[item.id]), None if worth is None else worth[place] >= 0.5)
                for (run, _), each, worth in zip(asked, saved, points, strict=True)
            ]
            samples.append(
                Sample(name, item.image, picture, _asked(item), benchmark.show_reference(item), said)
            )
    if samples and not pictures:
        listed = ", ".join(f"'{folder}'" for folder in folders)
        say(f"evaluate.images = {listed}: no picture of the benchmarks is there; the report shows none")
    return samples


def _chosen(points: Sequence[Sequence[float] | None], number: int) -> list[int]:
    """Places of the questions to show: half of them such that a run got wrong, both spread evenly."""
    judged = [worth for worth in points if worth is not None]
    wrong = [place for place in range(number) if any(worth[place] < 0.5 for worth in judged)]
    right = sorted({*range(number)} - {*wrong})
    few = min(len(wrong), max(_SAMPLES // 2, _SAMPLES - len(right)))
    return sorted([*_spread(wrong, few), *_spread(right, _SAMPLES - few)])


def _spread(places: Sequence[int], number: int) -> list[int]:
    if len(places) <= number:
        return list(places)
    return [places[(2 * k + 1) * len(places) // (2 * number)] for k in range(number)]


def _asked(item: Item) -> str:
    """The question as a person reads it, without the image's place and the standing instruction."""
    asked = item.text.turns[0].content.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    return asked.removesuffix(SHORT_ANSWER).removesuffix(LETTER)


def _thumbnail(path: Path) -> bytes | None:
    """A picture's file, made small where it is large; None where it cannot be shown."""
    try:
        data = path.read_bytes()
        if len(data) <= _SMALL_FILE:
            return data
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "jpeg", quality=80)
        return buffer.getvalue()
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return None
