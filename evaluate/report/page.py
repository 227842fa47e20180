"""The report as one HTML page that works from the file system, without network and by keyboard."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from fedcmp.evaluate.report import alignment
from fedcmp.evaluate.report.cards import cards
from fedcmp.evaluate.report.results import Report
from fedcmp.evaluate.report.scores import comparison, headline, silos, summary
from fedcmp.evaluate.report.tables import Cell, folded, section, table

_HERE = Path(__file__).parent


def page(report: Report, charts: Mapping[str, str], files: Mapping[str, str]) -> str:
    """The whole page, with nothing outside it but what it links to.

    Args:
        report: What to show.
        charts: SVG by file name, which lie beside the page.
        files: Other files beside it, by name what they hold.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [
        ("headlines", "Headlines", headline(report)),
        ("scores", "Scores", summary(report)),
        ("comparison", "Comparison", comparison(report, _figures(_some(charts, "differences")))),
        ("silos", "Silos and domains", silos(report)),
        ("training", "Training loss", _charts(charts, "loss")),
        ("alignment", "Alignment", _alignment(report, charts)),
        ("weights", "Reliability and weight of clients", _weights(charts)),
        ("answers", "Pictures, questions and answers", cards(report)),
        ("provenance", "Provenance", _provenance(report)),
        ("files", "Files", _files(files, charts)),
    ]
    shown = [each for each in sections if each[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown)
    body = "\n".join(section(*each) for each in shown)
    runs = f"{len(report.runs)} run{'s' if len(report.runs) > 1 else ''}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.experiment)} - FedCMP report</title><style>{style}</style></head>
<body><a class=skip href="#main">Skip to the content</a>
<header><h1>{escape(report.experiment)}</h1>
<p>Federated pre-training of a projector, {runs}. Intervals are 95&nbsp;% bootstrap intervals over images.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="main">
{body}
</main>
<footer><p>Written by <code>fedcmp report</code>.</p></footer>
<script>{script}</script></body></html>
"""


def _figures(charts: Mapping[str, str]) -> str:
    return "".join(
        f'<figure><div class=scroll role=region tabindex=0 aria-label="Chart {escape(name)}">{svg}</div>'
        f'<figcaption><a href="{escape(name)}" download>{escape(name)}</a></figcaption></figure>'
        for name, svg in charts.items()
    )


def _some(charts: Mapping[str, str], start: str) -> dict[str, str]:
    return {name: svg for name, svg in charts.items() if name.startswith(start)}


def _charts(charts: Mapping[str, str], start: str) -> str:
    found = _some(charts, start)
    together = {name: svg for name, svg in found.items() if name == f"{start}.svg"}
    each = {name: svg for name, svg in found.items() if name not in together}
    if not found:
        return ""
    return _figures(together) + folded(
        "Every run by client", f"<div class=panels>{_figures(each)}</div>", opened=not together
    )


def _weights(charts: Mapping[str, str]) -> str:
    reliability, weight = _some(charts, "reliability-"), _some(charts, "weight-")
    if not reliability and not weight:
        return ""
    told = (
        "<p>Reliability 1 is full weight; it is lower the less a client agrees with the consensus of others. "
    )
    told += "Weight is a client's share of the round's update, or of the step's reward. Hatched: the client "
    told += "was not in that round.</p>"
    return (
        told
        + _figures(reliability)
        + (folded("Weights", _figures(weight), opened=not reliability) if weight else "")
    )


def _alignment(report: Report, charts: Mapping[str, str]) -> str:
    drawn = _some(charts, alignment.START)
    shown = f"<div class=panels>{_figures(drawn)}</div>" if drawn else ""
    return shown + alignment.answers(report.runs)


def _provenance(report: Report) -> str:
    names = dict.fromkeys(name for run in report.runs for name in run.facts)
    if not names:
        return ""
    rows = []
    for name in names:
        values = [run.facts.get(name, "-") for run in report.runs]
        alike = len({*values}) == 1
        rows.append((name, [Cell(values[0], span=len(values))] if alike else [Cell(each) for each in values]))
    what = "What each run was made of; one cell is of all runs. Hashes are the start of SHA-256"
    shown = table(what, ["what", *(run.name for run in report.runs)], rows, "words")
    return folded("What each run was made of", shown, opened=True)


def _files(files: Mapping[str, str], charts: Mapping[str, str]) -> str:
    listed = "".join(
        f'<li><a href="{escape(name)}" download>{escape(name)}</a>: {escape(what)}</li>'
        for name, what in {**files, **dict.fromkeys(charts, "chart")}.items()
    )
    return f"<p>Beside this page:</p><ul>{listed}</ul>" if listed else ""
