"""Pictures, questions and answers, with filters; the script only hides and counts."""

from __future__ import annotations

import base64
import json
from html import escape

from fedcmp.evaluate.report.results import Report, Said, Sample

_VERDICTS = {"right": "right", "wrong": "wrong", "disagree": "runs disagree"}


def cards(report: Report) -> str:
    """The section's content; nothing where there are no samples."""
    if not report.samples:
        return ""
    runs = dict.fromkeys(said.run for sample in report.samples for said in sample.said)
    benchmarks = dict.fromkeys(sample.benchmark for sample in report.samples)
    choices = (
        ("run", {name: name for name in runs}),
        ("benchmark", {name: name for name in benchmarks}),
        ("verdict", _VERDICTS),
    )
    filters = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(said)}</option>' for value, said in each.items())
        + "</select></label>"
        for name, each in choices
    )
    totals = json.dumps(report.totals).replace("<", "\\u003c")
    return (
        "<p>Samples of each run's own errors and of questions that one run has right and another wrong, "
        "drawn by the experiment's seed. <span class=keys>j and k, or Tab, go from card to card.</span></p>"
        f"<form id=filters>{filters}<output id=count aria-live=polite></output></form>"
        f"<div class=cards>{''.join(map(_card, report.samples))}</div>"
        "<p><button type=button id=more hidden>Show more</button></p>"
        f'<script type="application/json" id="totals">{totals}</script>'
    )


def _card(sample: Sample) -> str:
    picture = f"<div class=none>no picture {escape(sample.image)}</div>"
    if sample.picture is not None:
        data = base64.b64encode(sample.picture).decode()
        source = f"data:image/{sample.form};base64,{data}"
        picture = f'<img alt="{escape(sample.image)}" decoding=async src="{source}">'
    answers = "".join(
        f'<div data-run="{escape(said.run)}" data-verdict="{_verdict(said)}"><dt>{escape(_whose(said))}</dt>'
        f"<dd>{escape(said.answer) or '<i>empty</i>'} {_badge(said)}</dd></div>"
        for said in sample.said
    )
    return (
        f'<article tabindex=0 aria-label="{escape(f"{sample.benchmark}: {sample.question}")}" '
        f'data-benchmark="{escape(sample.benchmark)}">{picture}<div>'
        f"<small>{escape(sample.benchmark)}</small><p>{escape(sample.question)}</p><dl><div><dt>reference</dt>"
        f"<dd>{escape(sample.reference)}</dd></div>{answers}</dl></div></article>"
    )


def _badge(said: Said) -> str:
    verdict = _verdict(said)
    return f'<span class="badge {verdict}">{verdict}</span>' if verdict else ""


def _whose(said: Said) -> str:
    return f"{said.run} ({said.by})" if said.by else said.run


def _verdict(said: Said) -> str:
    return "" if said.right is None else "right" if said.right else "wrong"
