"""The sections with scores: the best run of every benchmark, comparisons, all figures, groups."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import pstdev

from fedcmp.evaluate.report.charts import Span, forest
from fedcmp.evaluate.report.results import Column, Grouped, Report, RunResult, Score, Side, Versus
from fedcmp.evaluate.report.tables import NOTHING, Cell, folded, number, p_value, signed, table


def headline(report: Report) -> str:
    """A sentence for every benchmark: which run is best, by how much, and who is not in it."""
    sentences = "".join(f"<li>{_sentence(report, column)}</li>" for column in report.primary)
    absent = "".join(
        f"<li><b>{escape(name)}</b> is not in this report: {escape(why)}</li>"
        for name, why in report.absent.items()
    )
    gaps = "".join(
        f"<li><b>{escape(run.name)}</b> has no score of {escape(benchmark)}: {escape(note)}</li>"
        for run in report.runs
        for benchmark, note in run.notes.items()
        if benchmark not in run.scores
    )
    missing = f'<h3>Missing</h3><ul class="missing">{absent}{gaps}</ul>' if absent or gaps else ""
    return f"<ul>{sentences}</ul>{missing}"


def _sentence(report: Report, column: Column) -> str:
    ranked = ranking(report, column)
    score, name = ranked[0]
    benchmark, metric = column
    tied = [each for other, each in ranked if other["value"] == score["value"]]
    side = report.side(column)
    said = (
        f"<b>{escape(benchmark)}</b>, {escape(metric)} ({side} is better): <b>{escape(' and '.join(tied))}</b> "
        f"{'have' if len(tied) > 1 else 'has'} the best of {len(ranked)} runs, <b>{number(score['value'])}</b> "
        f"(95 % {number(score['low'])} to {number(score['high'])}, n = {score['n']:.0f})."
        if len(ranked) > 1
        else f"<b>{escape(benchmark)}</b>, {escape(metric)} ({side} is better): <b>{escape(name)}</b> has "
        f"<b>{number(score['value'])}</b> (95 % {number(score['low'])} to {number(score['high'])}, "
        f"n = {score['n']:.0f})."
    )
    versus = (
        next((row for row in report.comparison.rows if (row.run, row.column) == (name, column)), None)
        if report.comparison
        else None
    )
    if versus is not None and report.comparison is not None:
        said += (
            f" Against {escape(report.comparison.baseline)} it is {signed(versus.difference)} "
            f"({signed(versus.low)} to {signed(versus.high)}, p = {p_value(versus.adjusted)}): {versus.verdict}."
        ).replace("p = <", "p <")
    others = [run.name for run in report.runs if benchmark in run.others]
    if others:
        said += f" Not ranked, as they answered under other conditions: {escape(', '.join(others))}."
    return said


def ranking(report: Report, column: Column) -> list[tuple[Score, str]]:
    """Comparable runs by a headline, the best first."""
    benchmark, metric = column
    scored = [
        (run.scores[benchmark][metric], run.name)
        for run in report.runs
        if metric in run.scores.get(benchmark, {}) and benchmark not in run.others
    ]
    return sorted(scored, key=lambda each: each[0]["value"], reverse=report.side(column) != "lower")


def summary(report: Report) -> str:
    """Headline scores, a row a run; all figures and notes below, folded."""
    best = {column: ranking(report, column)[0][0]["value"] for column in report.primary}
    for column in report.headlines:
        if column not in best and report.side(column):
            best[column] = ranking(report, column)[0][0]["value"]
    heads = ["run", "strategy", *(_name(report, column) for column in report.headlines)]
    rows = [
        (
            run.name,
            [
                Cell(run.strategy),
                *(score_cell(_score(run, column), best.get(column)) for column in report.headlines),
            ],
        )
        for run in report.runs
    ]
    rows += [(name, [NOTHING] * (len(heads) - 1)) for name in report.absent]
    shown = table("Headline scores with 95 % bootstrap intervals over images; the best are bold", heads, rows)
    return (
        shown
        + folded("All figures", _all(report))
        + folded("Settings, and what was not scored", _notes(report))
    )


def _name(report: Report, column: Column) -> str:
    arrow = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}"}.get(
        report.side(column) or "", ""
    )
    return f"{column[0]}: {column[1]}{arrow}"


def _score(run: RunResult, column: Column) -> Score | None:
    return run.scores.get(column[0], {}).get(column[1])


def score_cell(score: Score | None, best: float | None = None) -> Cell:
    """A score with its interval and number of questions."""
    if score is None:
        return NOTHING
    small = f"{number(score['low'])} to {number(score['high'])}, n = {score['n']:.0f}"
    return Cell(number(score["value"]), small, score["value"] == best)


def _all(report: Report) -> str:
    heads = ["benchmark: metric", *(run.name for run in report.runs)]
    rows = [
        (": ".join(column), [score_cell(_score(run, column)) for run in report.runs])
        for column in report.columns
    ]
    return table("Every figure of every benchmark", heads, rows)


def _notes(report: Report) -> str:
    names = dict.fromkeys(name for run in report.runs for name in run.notes)
    rows = [
        (name, [Cell(run.notes.get(name, "") or "nothing to note") for run in report.runs]) for name in names
    ]
    return table(
        "Settings, and what was not scored", ["benchmark", *(run.name for run in report.runs)], rows, "words"
    )


def comparison(report: Report, chart: str) -> str:
    """Differences to the baseline as a chart and as a table."""
    compared = report.comparison
    if compared is None:
        return ""
    missing = "".join(f"<li>{escape(each)}</li>" for each in compared.missing)
    left = f"<p>Not compared:</p><ul class=missing>{missing}</ul>" if missing else ""
    if not compared.rows:
        return left
    heads = [
        "run",
        "benchmark: metric",
        "run's value",
        compared.baseline,
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "n",
        "direction",
    ]
    rows = [(row.run, _versus(row)) for row in compared.rows]
    what = f"Every run minus {compared.baseline}, on the same questions"
    return (
        f"<p>Paired bootstrap over images, at least 20,000 draws. P (Holm) is adjusted for all {len(rows)} rows; "
        "a direction is stated where it is below 0.05. Intervals cover images, not other seeds.</p>"
        f"{chart}{table(what, heads, rows)}{left}"
    )


def _versus(row: Versus) -> list[Cell]:
    dropped = f"{row.dropped} left out" if row.dropped else ""
    return [
        Cell(": ".join(row.column)),
        Cell(number(row.value)),
        Cell(number(row.base)),
        Cell(signed(row.difference)),
        Cell(f"{signed(row.low)} to {signed(row.high)}"),
        Cell(p_value(row.p)),
        Cell(p_value(row.adjusted)),
        Cell(str(row.n), dropped),
        Cell(row.verdict, best=row.verdict != "no clear difference"),
    ]


def difference_chart(report: Report) -> str:
    """Differences in the chief metric of every benchmark; nothing where there are none."""
    compared = report.comparison
    if compared is None:
        return ""
    blocks = {
        f"{_name(report, column)}": {
            row.run: Span(
                row.difference,
                row.low,
                row.high,
                f"{row.run}, {column[0]}: {signed(row.difference)} ({signed(row.low)} to {signed(row.high)}), {row.verdict}",
                row.verdict != "no clear difference",
            )
            for row in compared.rows
            if row.column == column
        }
        for column in report.primary
    }
    blocks = {name: block for name, block in blocks.items() if block}
    if not blocks:
        return ""
    return forest(
        f"Differences to {compared.baseline}",
        blocks,
        "difference with 95 % interval; filled: p (Holm) < 0.05",
    )


def silos(report: Report) -> str:
    """What every silo has and how well it is served: training, then scores by group."""
    return _training(report.runs) + "".join(_group(report, each) for each in report.groups)


def _training(runs: Sequence[RunResult]) -> str:
    names = dict.fromkeys(silo for run in runs for silo in run.silos)
    if not names:
        return ""
    last = {run.name: _last_losses(run) for run in runs}
    shown = [run.name for run in runs if last[run.name]]
    rows = [
        (
            silo,
            [
                Cell(" / ".join(dict.fromkeys(f"{run.silos[silo]:,}" for run in runs if silo in run.silos))),
                *(Cell(number(last[name][silo])) if silo in last[name] else NOTHING for name in shown),
            ],
        )
        for silo in names
    ]
    heads = ["silo", "training texts", *(f"{name}: last loss" for name in shown)]
    return table("Silos: texts, and training loss in the last round each took part in", heads, rows)


def _last_losses(run: RunResult) -> dict[str, float]:
    return {
        row["client"]: row["loss"] for row in run.history if row["client"] and row.get("loss") is not None
    }


def _group(report: Report, group: Grouped) -> str:
    runs = [run.name for run in report.runs if any(run.name in each for each in group.scores.values())]
    arrow = f" ({group.better} is better)" if group.better else ""
    rows = [(name, [score_cell(scores.get(run)) for run in runs]) for name, scores in group.scores.items()]
    by_run = {
        run: [scores[run]["value"] for scores in group.scores.values() if run in scores] for run in runs
    }
    if group.better:
        worst = min if group.better == "higher" else max
        rows.append(("worst", [Cell(number(worst(by_run[run]))) for run in runs]))
    rows.append(("standard deviation", [Cell(number(pstdev(by_run[run]))) for run in runs]))
    return table(f"{': '.join(group.column)} by {group.what}{arrow}", [group.what, *runs], rows, "grouped")
