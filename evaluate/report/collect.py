"""The runs of an experiment side by side: `report.html`, `report.md`, `report.json`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from fedcmp.evaluate.benchmarks.base import LETTER, SHORT_ANSWER, Benchmark, Item
from fedcmp.evaluate.report.page import RunResult, Said, Sample, page
from fedcmp.evaluate.scoring import Given, given, read_scores
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import Work, benchmarks_of, recall
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic, write_json
from fedcmp.pipeline.records import IMAGE_PLACEHOLDER

_SAMPLES = 24
_THUMBNAIL = 320
_SMALL_FILE = 30_000
_FORMATS = ("png", "jpeg", "gif", "webp")
_EXPECTED = ("items", "projectors")
_OF_THE_RUN = ("seed", "answers")


@dataclass(frozen=True)
class Judged:
    """One run with what it was asked and what it said, where it was asked at all."""

    experiment: Experiment
    benchmarks: dict[str, Benchmark]
    works: dict[str, Work]
    given: dict[str, Given]
    contents: dict[str, dict[str, Any]]
    result: RunResult


def write_report(experiments: Sequence[Experiment]) -> Path:
    """Write the report of runs that are evaluated; a benchmark that a run lacks is a gap with a note.

    Returns:
        Its directory.

    Raises:
        UserError: The runs are of several experiments, one of them is not evaluated, or scores do not fit
            what they should be of.
    """
    names = {experiment.experiment for experiment in experiments}
    if len(names) > 1:
        raise UserError(f"one report is about one experiment, these are {', '.join(sorted(names))}")
    runs = [_judged(experiment) for experiment in experiments]
    _mark_others(runs)
    results = [run.result for run in runs]
    experiment = experiments[0]
    out = experiment.report_path
    write_json(out / "report.json", _json(experiment.experiment, runs))
    write_atomic(out / "report.md", _markdown(experiment.experiment, results).encode())
    content = page(experiment.experiment, results, columns_of(results), _samples(runs))
    write_atomic(out / "report.html", content.encode())
    heads, rows = _summary(results, between="\n")
    table(f"{experiment.experiment}: value and 95 % bootstrap interval over images", heads, rows)
    for result in results:
        for benchmark, note in result.notes.items():
            if benchmark not in result.scores or benchmark in result.limits:
                say(f"{result.name}, {benchmark}: {note}")
    for run in runs:
        for benchmark, scored in run.contents.items():
            for warning in scored["warnings"]:
                say(f"{run.result.name}, {benchmark}: {warning}")
    say(f"Report: {out / 'report.html'}")
    return out


def _judged(experiment: Experiment) -> Judged:
    trained = trained_run(experiment, asking=False)
    result = RunResult(experiment.run, trained.manifest["strategy"], {}, [], {}, trained.history)
    run = Judged(experiment, benchmarks_of(experiment), {}, {}, {}, result)
    for name, benchmark in run.benchmarks.items():
        if not (experiment.scores_path / f"{name}.json").is_file():
            result.notes[name] = "no scores; run 'fedcmp evaluate'"
            continue
        work = recall(experiment, name, benchmark)
        content = read_scores(experiment, trained, work)
        run.works[name], run.given[name] = work, given(experiment, trained, work)
        run.contents[name] = content
        if work.limit is not None:
            result.limits[name] = work.limit
        result.scores[name] = content["metrics"]
        result.headlines.extend((name, metric) for metric in content["headlines"])
        result.notes[name] = _note(content)
    if not run.works:
        raise UserError(f"run '{experiment.run}' has no scores; run 'fedcmp evaluate' first")
    return run


def _note(content: dict[str, Any]) -> str:
    """What a score must not be quoted without, and what was not scored."""
    settings = [f"{what}: {value}" for what, value in content["settings"].items()]
    left_out = [
        f"{number} {what}" for what, number in content["counts"].items() if what not in _EXPECTED and number
    ]
    projectors = content["counts"]["projectors"]
    several = [f"mean over {projectors} projectors"] if projectors > 1 else []
    said = content["counts"]["items"] * projectors
    remarks = [f"{number} {what} ({number / said:.0%})" for what, number in content["remarks"].items()]
    return "; ".join([*several, *settings, *left_out, *remarks, *content["warnings"]])


def _mark_others(runs: Sequence[Judged]) -> None:
    """Note where scores beside each other are of other questions, labels, rules or options, or are none."""
    names = dict.fromkeys(name for run in runs for name in run.benchmarks)
    first: dict[str, Judged] = {}
    for run in runs:
        for name in names:
            run.result.notes.setdefault(name, "not among this run's benchmarks")
        for name, content in run.contents.items():
            model = first.setdefault(name, run)
            theirs = model.contents[name]["made_of"]
            ours = content["made_of"]
            keys = [key for key in dict.fromkeys([*ours, *theirs]) if key not in _OF_THE_RUN]
            # An option that a file from before there was such a choice lacks is none.
            changed = [key for key in keys if differences(theirs.get(key), ours.get(key))]
            if changed:
                note = f"not comparable with '{model.result.name}': other {', '.join(changed)}"
                run.result.notes[name] = "; ".join(filter(None, [note, run.result.notes[name]]))
                say(f"{run.result.name}, {name}: {note}")


def _json(experiment: str, runs: Sequence[Judged]) -> dict[str, Any]:
    kept = ("made_of", "settings", "counts", "remarks", "warnings")
    return {
        "experiment": experiment,
        "runs": {
            run.result.name: {
                "strategy": run.result.strategy,
                "benchmarks": run.result.scores,
                "details": {
                    name: {key: content[key] for key in kept} for name, content in run.contents.items()
                },
                "notes": run.result.notes,
            }
            for run in runs
        },
    }


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
    part = f"{between}first {result.limits[column[0]]}" if column[0] in result.limits else ""
    return f"{score['value']:.3f}{between}({score['low']:.3f}-{score['high']:.3f}){part}"


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
    lines += ["", "| run | benchmark | n | settings, and what was not scored |", "|---|---|---|---|"]
    lines += [
        f"| {result.name} | {benchmark} | {_number(result, benchmark)} | {note.replace('|', '/')} |"
        for result in results
        for benchmark, note in result.notes.items()
    ]
    return "\n".join(lines) + "\n"


def _number(result: RunResult, benchmark: str) -> str:
    """Questions behind the metrics: the most that one has."""
    numbers = [int(score["n"]) for score in result.scores.get(benchmark, {}).values()]
    return str(max(numbers, default="-"))


def _samples(runs: Sequence[Judged]) -> list[Sample]:
    """Questions of every benchmark that is answered in words, with every run's answer."""
    samples, folders, pictures = [], set(), 0
    for name in dict.fromkeys(name for run in runs for name in run.works):
        asked = [run for run in runs if name in run.works]
        benchmark = asked[0].benchmarks[name]
        if benchmark.mode not in ("generate", "rank", "weigh"):
            continue
        items = _common([run.given[name].items for run in asked])
        answers = [run.given[name].answers[0] for run in asked]
        points = [run.benchmarks[name].points(items, each) for run, each in zip(asked, answers, strict=True)]
        folder = benchmark.images or runs[0].experiment.evaluate.images
        folders.add(folder)
        for place in _chosen(points, len(items)):
            item = items[place]
            picture = _thumbnail(folder, item.image) if folder else None
            pictures += picture is not None
            said = [
                Said(
                    run.result.name,
                    benchmark.show_answer(item, each[item.id]),
                    None if worth is None else worth[place] >= 0.5,
                    _whose(run.given[name].projectors),
                )
                for run, each, worth in zip(asked, answers, points, strict=True)
            ]
            data, form = picture or (None, "")
            reference = benchmark.show_reference(item)
            samples.append(Sample(name, item.image, data, _asked(item), reference, said, form))
    if samples and not pictures:
        listed = ", ".join(f"'{folder}'" for folder in folders)
        say(f"evaluate.images = {listed}: no picture of the benchmarks is there; the report shows none")
    return samples


def _common(listed: Sequence[Sequence[Item]]) -> list[Item]:
    """The items that are in all lists, in the order of the first."""
    others = [{*each} for each in listed[1:]]
    return [item for item in listed[0] if all(item in each for each in others)]


def _whose(projectors: Sequence[str]) -> str:
    """Whose answers are shown of a run with several projectors: the first one's."""
    if len(projectors) == 1:
        return ""
    return f"silo {Path(projectors[0]).stem}, first of {len(projectors)}"


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
    asked = item.text.turns[-1].content.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    return asked.removesuffix(SHORT_ANSWER).removesuffix(LETTER)


def _thumbnail(folder: Path, name: str) -> tuple[bytes, str] | None:
    """A picture's file with its format, made small where it is large; None where it cannot be shown.

    Names may come from a partner's cache: only pictures are shown, and only such as lie in the folder.
    """
    place = PurePath(name)
    if place.is_absolute() or ".." in place.parts:
        return None
    try:
        data = (folder / place).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small, form = image.convert("RGB"), str(image.format).lower()
        if len(data) <= _SMALL_FILE and form in _FORMATS:
            return data, form
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "jpeg", quality=80)
        return buffer.getvalue(), "jpeg"
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return None
