"""The report as one HTML page that works from the file system, without network and by keyboard."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fedcmp.evaluate.report import charts

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class RunResult:
    """What the report shows of one run.

    Attributes:
        name: The run's name.
        strategy: Its strategy.
        scores: By benchmark and metric.
        headlines: (benchmark, metric) of a summary.
        notes: What scores must not be quoted without, by benchmark; or why there are none.
        limits: How many questions were taken, by benchmark, where that is not all.
        history: Its rows by round and client.
    """

    name: str
    strategy: str
    scores: dict[str, dict[str, dict[str, float]]]
    headlines: list[tuple[str, str]]
    notes: dict[str, str]
    history: list[dict[str, Any]]
    limits: dict[str, int] = field(default_factory=dict)


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


def page(
    experiment: str,
    results: Sequence[RunResult],
    columns: Sequence[tuple[str, str]],
    samples: Sequence[Sample],
) -> str:
    """The whole page, with nothing outside it.

    Args:
        experiment: Its name.
        results: The runs.
        columns: Every (benchmark, metric), in order.
        samples: Questions to show.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [_score_table(results, columns), _curves(results), _reliability(results), _cards(samples)]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(experiment)} - FedCMP report</title><style>{style}</style></head>
<body><h1>{escape(experiment)}</h1>
<p>Federated pre-training of a projector. Values with their 95&nbsp;% bootstrap interval over images.</p>
{body}
<script>{script}</script></body></html>
"""


def _score_table(results: Sequence[RunResult], columns: Sequence[tuple[str, str]]) -> str:
    rows, told = [], set()
    for benchmark, metric in columns:
        first = benchmark not in told
        told.add(benchmark)
        cells = "".join(
            f"<td>{_interval(result, benchmark, metric)}{_note(result, benchmark) if first else ''}</td>"
            for result in results
        )
        rows.append(f"<tr><th>{escape(benchmark)}: {escape(metric)}</th>{cells}</tr>")
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
    bounds = f"{score['low']:.3f} to {score['high']:.3f}"
    part = f", first {result.limits[benchmark]} questions" if benchmark in result.limits else ""
    return f"<b>{score['value']:.3f}</b><br><small>{bounds}<br>n = {score['n']}{part}</small>"


def _note(result: RunResult, benchmark: str) -> str:
    note = result.notes.get(benchmark)
    return f"<br><small>{escape(note)}</small>" if note else ""


def _by_client(result: RunResult, figure: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in result.history:
        if row["client"] and row.get(figure) is not None:
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


def _cards(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    runs = dict.fromkeys(said.run for sample in samples for said in sample.said)
    benchmarks = dict.fromkeys(sample.benchmark for sample in samples)
    filters = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(each)}">{escape(each)}</option>' for each in choices)
        + "</select></label>"
        for name, choices in (("run", runs), ("benchmark", benchmarks), ("verdict", ("right", "wrong")))
    )
    cards = "".join(map(_card, samples))
    return (
        "<h2>Pictures, questions and answers</h2>"
        f"<form id=filters>{filters}<output id=count aria-live=polite></output></form>"
        "<p><small>j and k, or Tab, go from card to card.</small></p>"
        f"<div class=cards>{cards}</div>"
    )


def _card(sample: Sample) -> str:
    picture = f"<div class=none>no picture {escape(sample.image)}</div>"
    if sample.picture is not None:
        data = base64.b64encode(sample.picture).decode()
        source = f"data:image/{sample.form};base64,{data}"
        picture = f'<img alt="{escape(sample.image)}" loading=lazy src="{source}">'
    answers = "".join(
        f'<div data-run="{escape(said.run)}" data-verdict="{_verdict(said)}"><dt>{escape(_whose(said))}</dt>'
        f"<dd>{escape(said.answer) or '<i>empty</i>'} <small>{_verdict(said)}</small></dd></div>"
        for said in sample.said
    )
    return (
        f'<article tabindex=0 data-benchmark="{escape(sample.benchmark)}">{picture}<div>'
        f"<small>{escape(sample.benchmark)}</small><p>{escape(sample.question)}</p><dl><div><dt>reference</dt>"
        f"<dd>{escape(sample.reference)}</dd></div>{answers}</dl></div></article>"
    )


def _whose(said: Said) -> str:
    return f"{said.run} ({said.by})" if said.by else said.run


def _verdict(said: Said) -> str:
    return "" if said.right is None else "right" if said.right else "wrong"
