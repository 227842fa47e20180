"""The runs of an experiment side by side: `report.html`, `report.md`, `report.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from evaluate import charts
from evaluate.run import answers_of, benchmarks_of, prepare, read_manifest
from pipeline.config import Experiment
from pipeline.console import say, table
from pipeline.errors import UserError
from pipeline.manifest import read_json, write_atomic, write_json

_SAMPLES = 6


@dataclass(frozen=True)
class RunResult:
    """What the report shows of one run; `history` are its rows by round and client."""

    name: str
    strategy: str
    scores: dict[str, dict[str, dict[str, float]]]
    headlines: list[tuple[str, str]]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One question about one picture, with every run's answer."""

    benchmark: str
    picture: bytes
    question: str
    reference: str
    answers: dict[str, str]


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
    results = [_result(experiment) for experiment in experiments]
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
    page = _html(experiment.experiment, results, _samples(experiments))
    write_atomic(out / "report.html", page.encode())
    heads, rows = _summary(results, between="\n")
    table(f"{experiment.experiment}: value and 95 % bootstrap interval over images", heads, rows)
    say(f"Report: {out / 'report.html'}")
    return out


def _result(experiment: Experiment) -> RunResult:
    manifest = read_manifest(experiment)
    scores, headlines = {}, []
    for name in benchmarks_of(experiment):
        content = read_json(experiment.scores_path / f"{name}.json")
        if content is None:
            raise UserError(f"run '{experiment.run}' has no scores of '{name}'; run 'fedcmp evaluate' first")
        scores[name] = content["metrics"]
        headlines += [(name, metric) for metric in content["headlines"]]
    lines = (experiment.run_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    return RunResult(experiment.run, manifest["strategy"], scores, headlines, history)


def _columns(results: Sequence[RunResult]) -> list[tuple[str, str]]:
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
    return [column for column in _columns(results) if column in wanted]


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


def _samples(experiments: Sequence[Experiment]) -> list[Sample]:
    """A few questions of every generated benchmark, spread evenly over its items."""
    experiment = experiments[0]
    folder = experiment.evaluate.images
    if folder is None:
        return []
    samples = []
    for name, benchmark in benchmarks_of(experiment).items():
        if benchmark.likelihood:
            continue
        work = prepare(experiment, name, benchmark)
        answers = {
            each.run: answers_of(each, prepare(each, name, benchmarks_of(each)[name]), read_manifest(each))
            for each in experiments
        }
        step = max(len(work.items) // _SAMPLES, 1)
        for item in work.items[step // 2 :: step][:_SAMPLES]:
            picture = folder / item.image
            if picture.is_file():
                said = {run: str(by_item.get(item.id, "")) for run, by_item in answers.items()}
                question = item.text.turns[0].content.split("\n")[1]
                reference = benchmark.show_reference(item)
                samples.append(Sample(name, picture.read_bytes(), question, reference, said))
    if not samples:
        say(f"evaluate.images = '{folder}': no picture of the benchmarks is there; the report shows none")
    return samples


def _html(experiment: str, results: Sequence[RunResult], samples: Sequence[Sample]) -> str:
    sections = [_score_table(results), _curves(results), _reliability(results), _sample_cards(samples)]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(experiment)} - FedCMP report</title><style>{_STYLE}</style></head>
<body><h1>{escape(experiment)}</h1>
<p>Federated pre-training of a projector. Values with their 95&nbsp;% bootstrap interval over images.</p>
{body}
</body></html>
"""


def _score_table(results: Sequence[RunResult]) -> str:
    rows = []
    for benchmark, metric in _columns(results):
        cells = "".join(f"<td>{_interval(result, benchmark, metric)}</td>" for result in results)
        number = next(
            result.scores[benchmark][metric]["n"]
            for result in results
            if metric in result.scores.get(benchmark, {})
        )
        rows.append(
            f"<tr><th>{escape(benchmark)}: {escape(metric)}<br><small>n = {number}</small></th>{cells}</tr>"
        )
    heads = "".join(
        f"<th>{escape(result.name)}<br><small>{escape(result.strategy)}</small></th>" for result in results
    )
    return (
        "<h2>Scores</h2><div class=scroll><table><thead><tr><th></th>"
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _interval(result: RunResult, benchmark: str, metric: str) -> str:
    score = result.scores.get(benchmark, {}).get(metric)
    if score is None:
        return "-"
    return f"<b>{score['value']:.3f}</b><br><small>{score['low']:.3f} to {score['high']:.3f}</small>"


def _by_client(result: RunResult, figure: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in result.history:
        if row["client"] and figure in row:
            series.setdefault(row["client"], []).append((row["round"] + 1, row[figure]))
    return series


def _curves(results: Sequence[RunResult]) -> str:
    losses = {result.name: _by_client(result, "loss") for result in results}
    losses = {name: series for name, series in losses.items() if series}
    if not losses:
        return ""
    clients = list(dict.fromkeys(client for series in losses.values() for client in series))
    values = [value for series in losses.values() for points in series.values() for _, value in points]
    panels = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{charts.lines(series, clients, values)}</figure>"
        for name, series in losses.items()
    )
    return (
        "<h2>Training loss by client and round</h2>"
        f"<p>Nats a supervised token, logarithmic scale. {charts.legend(clients)}</p>"
        f"<div class=panels>{panels}</div>"
    )


def _reliability(results: Sequence[RunResult]) -> str:
    panels = "".join(
        f"<figure><figcaption>{escape(result.name)}</figcaption>{charts.heat_map(series)}</figure>"
        for result in results
        if (series := _by_client(result, "reliability"))
    )
    if not panels:
        return ""
    return (
        "<h2>Reliability of clients by round</h2><p>1 is full weight; the less a client agrees with "
        f"the others' consensus, the lighter.</p><div class=panels>{panels}</div>"
    )


def _sample_cards(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        picture = base64.b64encode(sample.picture).decode()
        answers = "".join(
            f"<dt>{escape(run)}</dt><dd>{escape(answer) or '<i>empty</i>'}</dd>"
            for run, answer in sample.answers.items()
        )
        cards.append(
            f'<article><img alt="" src="data:image;base64,{picture}"><div>'
            f"<small>{escape(sample.benchmark)}</small><p>{escape(sample.question)}</p>"
            f"<dl><dt>reference</dt><dd>{escape(sample.reference)}</dd>{answers}</dl></div></article>"
        )
    return f"<h2>Pictures and answers</h2><div class=cards>{''.join(cards)}</div>"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h2 { margin-top: 2.5rem } small { opacity: .7 } .scroll { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line);
  text-align: left; white-space: nowrap } tbody th { font-weight: 400 }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0 }
figcaption { font-weight: 600 } svg { max-width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; border-radius: 2px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1rem }
article { display: flex; gap: 1rem; border: 1px solid var(--line); border-radius: 6px; padding: .8rem }
article img { width: 6rem; height: 6rem; flex: none; object-fit: contain; image-rendering: pixelated }
article p { margin: 0 0 .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem; margin: 0 }
dt { opacity: .7 } dd { margin: 0 }
@media (max-width: 40rem) { .cards { grid-template-columns: 1fr } article { flex-direction: column } }
"""
