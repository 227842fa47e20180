"""The report's figures for spreadsheets, papers and programs: CSV, LaTeX, Markdown, JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from fedcmp.evaluate.report.results import Column, Report, RunResult, Score
from fedcmp.evaluate.report.scores import ranking

_FIGURES = ("value", "low", "high", "n")
_HISTORY = (
    *("round", "client", "loss", "samples", "tokens", "seconds", "update_norm", "reliability", "weight"),
    *("epsilon", "bytes", "bytes_received"),
)
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([heads, *rows])
    return buffer.getvalue()


def scores_csv(report: Report) -> str:
    """A row a run, benchmark and metric; then a row a group, whose kind and name have columns."""
    heads = ["experiment", "run", "strategy", "benchmark", "metric", "grouped by", "group", *_FIGURES]
    rows: list[list[Any]] = []
    strategies = {run.name: run.strategy for run in report.runs}

    def add(run: str, column: Column, what: str, group: str, score: Score) -> None:
        figures = [score[each] for each in _FIGURES]
        rows.append([report.experiment, run, strategies[run], *column, what, group, *figures])

    for run in report.runs:
        for benchmark, metrics in run.scores.items():
            for metric, score in metrics.items():
                add(run.name, (benchmark, metric), "", "", score)
    for each in report.groups:
        for group, by_run in each.scores.items():
            for name, figures in by_run.items():
                add(name, each.column, each.what, group, figures)
    return _csv(heads, rows)


def comparison_csv(report: Report) -> str:
    """A row a run and headline against the baseline."""
    heads = ["run", "baseline", "benchmark", "metric", "value", "baseline value", "difference", "low", "high"]
    heads += ["p", "p Holm", "n", "left out", "direction"]
    compared = report.comparison
    figures = ("value", "base", "difference", "low", "high", "p", "adjusted", "n", "dropped", "verdict")
    rows = []
    if compared is not None:
        for row in compared.rows:
            rows.append([row.run, compared.baseline, *row.column, *(getattr(row, name) for name in figures)])
    return _csv(heads, rows)


def history_csv(report: Report) -> str:
    """A row a run, round and client; the client of a round's own row is empty."""
    rows = [
        [run.name, row["round"] + 1, row["client"], *(row.get(name) for name in _HISTORY[2:])]
        for run in report.runs
        for row in run.history
    ]
    return _csv(["run", *_HISTORY], rows)


def scores_tex(report: Report) -> str:
    """Headline scores as a table of LaTeX's package booktabs; the best of each column are bold."""
    columns = report.headlines
    best = {
        column: ranked[0][0]["value"]
        for column in columns
        if report.side(column) and (ranked := ranking(report, column))
    }
    heads = ["run", *(f"{benchmark}: {metric}" for benchmark, metric in columns)]
    lines = [
        r"% \usepackage{booktabs}; 95 % bootstrap intervals over images",
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\toprule",
        " & ".join(map(_tex, heads)) + r" \\",
        r"\midrule",
    ]
    for run in report.runs:
        cells = [_tex_cell(run, column, best.get(column)) for column in columns]
        lines.append(" & ".join([_tex(run.name), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex_cell(run: RunResult, column: Column, best: float | None) -> str:
    score = run.scores.get(column[0], {}).get(column[1])
    if score is None:
        return "--"
    value = f"{score['value']:.3f}"
    value = rf"\textbf{{{value}}}" if score["value"] == best else value
    return rf"{value} {{\scriptsize [{score['low']:.3f}, {score['high']:.3f}]}}"


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def summary_rows(report: Report, between: str = " ") -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the headline table."""
    columns = report.headlines
    heads = ["run", *(f"{benchmark}:{between}{metric}" for benchmark, metric in columns)]
    return heads, [[run.name, *(_cell(run, each, between) for each in columns)] for run in report.runs]


def _cell(run: RunResult, column: Column, between: str) -> str:
    score = run.scores.get(column[0], {}).get(column[1])
    if score is None:
        return "-"
    part = f"{between}first {run.limits[column[0]]}" if column[0] in run.limits else ""
    return f"{score['value']:.3f}{between}({score['low']:.3f}-{score['high']:.3f}){part}"


def markdown(report: Report) -> str:
    """Headline scores, comparisons and notes."""
    heads, rows = summary_rows(report)
    lines = [f"# {report.experiment}", "", "Value and 95 % bootstrap interval over images.", ""]
    lines += _table(heads, rows)
    if report.comparison and report.comparison.rows:
        lines += ["", f"Every run minus {report.comparison.baseline}, on the same questions.", ""]
        heads = ["run", "metric", "difference", "95 % interval", "p", "p (Holm)", "direction"]
        lines += _table(
            heads,
            [
                [
                    row.run,
                    ": ".join(row.column),
                    f"{row.difference:+.3f}",
                    f"{row.low:+.3f} to {row.high:+.3f}",
                    f"{row.p:.4f}",
                    f"{row.adjusted:.4f}",
                    row.verdict,
                ]
                for row in report.comparison.rows
            ],
        )
    notes = [
        [run.name, benchmark, _number(run, benchmark), note]
        for run in report.runs
        for benchmark, note in run.notes.items()
    ]
    notes += [[name, "-", "-", why] for name, why in report.absent.items()]
    lines += ["", *_table(["run", "benchmark", "n", "settings, and what was not scored"], notes)]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *body]


def _number(result: RunResult, benchmark: str) -> str:
    """Questions behind the metrics: the most that one has."""
    numbers = [int(score["n"]) for score in result.scores.get(benchmark, {}).values()]
    return str(max(numbers, default="-"))


def as_json(report: Report, details: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Everything but pictures and answers.

    Args:
        report: The report.
        details: What scores were made of, by run and benchmark.
    """
    return {
        "experiment": report.experiment,
        "runs": {
            run.name: {
                "strategy": run.strategy,
                "benchmarks": run.scores,
                "details": details[run.name],
                "notes": run.notes,
                "provenance": run.facts,
            }
            for run in report.runs
        },
        "absent": report.absent,
        "comparison": asdict(report.comparison) if report.comparison else None,
        "groups": [asdict(each) for each in report.groups],
    }
