"""The runs of an experiment side by side: one page, and beside it its figures and charts as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedcmp.evaluate.report import alignment, downloads, training
from fedcmp.evaluate.report.groups import grouped
from fedcmp.evaluate.report.judged import Judged, columns_of, judged_runs
from fedcmp.evaluate.report.page import page
from fedcmp.evaluate.report.results import Report
from fedcmp.evaluate.report.samples import sampled
from fedcmp.evaluate.report.scores import difference_chart
from fedcmp.evaluate.report.versus import baseline_of, compared
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic, write_json

_KEPT = ("made_of", "settings", "counts", "remarks", "warnings")


def write_report(experiments: Sequence[Experiment], baseline: str | None = None) -> Path:
    """Write the report of runs that are evaluated; a run or benchmark that is missing is a gap with a note.

    Args:
        experiments: The runs.
        baseline: The run that others are compared with, by default the first of FedAvg, else the first.

    Returns:
        Its directory.

    Raises:
        UserError: The runs are of several experiments, none of them is evaluated, or scores do not fit
            what they should be of.
    """
    names = {experiment.experiment for experiment in experiments}
    if len(names) > 1:
        raise UserError(f"one report is about one experiment, these are {', '.join(sorted(names))}")
    runs, absent = judged_runs(experiments)
    report = _report(runs, absent, baseline)
    out = experiments[0].report_path
    _write(out, report, runs)
    _tell(report)
    say(f"Report: {out / 'report.html'}")
    return out


def _report(runs: Sequence[Judged], absent: dict[str, str], baseline: str | None) -> Report:
    results = [run.result for run in runs]
    found = sampled(runs)
    if found.no_pictures:
        listed = ", ".join(f"'{folder}'" for folder in found.no_pictures)
        say(f"evaluate.images = {listed}: no picture of the benchmarks is there; the report shows none")
    return Report(
        runs[0].experiment.experiment,
        results,
        absent,
        columns_of(results),
        compared(runs, baseline_of(runs, baseline)),
        grouped(runs),
        found.samples,
        found.totals,
    )


def _write(out: Path, report: Report, runs: Sequence[Judged]) -> None:
    charts = {"differences.svg": difference_chart(report)}
    charts |= training.curves(report.runs) | training.weights(report.runs) | alignment.curves(report.runs)
    charts = {name: svg for name, svg in charts.items() if svg}
    files = {
        "scores.csv": ("scores, whole and by group", downloads.scores_csv(report)),
        "scores.tex": ("headline scores for LaTeX (booktabs)", downloads.scores_tex(report)),
        "comparison.csv": ("differences to the baseline", downloads.comparison_csv(report)),
        "history.csv": ("training, a row a round and client", downloads.history_csv(report)),
        "report.md": ("headline scores and notes as Markdown", downloads.markdown(report)),
    }
    told = {name: what for name, (what, _) in files.items()}
    told["report.json"] = "all figures, what they were made of, and provenance"
    for old in out.glob("*.svg"):
        if old.name not in charts:
            old.unlink()
    for name, text in (charts | {name: text for name, (_, text) in files.items()}).items():
        write_atomic(out / name, text.encode())
    details = {
        run.result.name: {
            name: {key: content[key] for key in _KEPT} for name, content in run.contents.items()
        }
        for run in runs
    }
    write_json(out / "report.json", downloads.as_json(report, details))
    write_atomic(out / "report.html", page(report, charts, told).encode())


def _tell(report: Report) -> None:
    heads, rows = downloads.summary_rows(report, between="\n")
    table(f"{report.experiment}: value and 95 % bootstrap interval over images", heads, rows)
    for run in report.runs:
        for benchmark, note in run.notes.items():
            if benchmark in run.others:
                say(f"{run.name}, {benchmark}: {run.others[benchmark]}")
            elif benchmark not in run.scores or benchmark in run.limits:
                say(f"{run.name}, {benchmark}: {note}")
        for benchmark, warnings in run.warnings.items():
            for warning in warnings:
                say(f"{run.name}, {benchmark}: {warning}")
    for why in report.absent.values():
        say(f"left out: {why}")
