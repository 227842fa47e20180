"""The sections with scores: the best run of every benchmark, comparisons, all figures, groups."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import pstdev

from fedcmp.evaluate.report.charts import Span, forest
from fedcmp.evaluate.report.results import Column, Grouped, Report, RunResult, Score, Versus
from fedcmp.evaluate.report.tables import NOTHING, Cell, folded, number, p_value, signed, table

# Strategies that are no federation, and what an untrained run is called.
_BOUNDS = ("centralised", "local_only", "none")


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
    best = [each for other, each in ranked if other["value"] == score["value"]]
    verb = "have" if len(best) > 1 else "has"
    place = f"{verb} the best of {len(ranked)} runs," if len(ranked) > 1 else verb
    said = (
        f"<b>{escape(benchmark)}</b>, {escape(metric)} ({report.side(column)} is better): "
        f"<b>{escape(' and '.join(best))}</b> {place} <b>{number(score['value'])}</b> "
        f"(95 % interval {number(score['low'])} to {number(score['high'])}, n = {score['n']:.0f})."
    )
    said += _against(report, name, column)
    bounds = {run.name for run in report.runs if run.strategy in _BOUNDS}
    others = [run.name for run in report.runs if benchmark in run.others]
    if others:
        said += f" Not ranked, as they answered under other conditions: {escape(', '.join(others))}."
    federated = [(each, run) for each, run in ranked if run not in bounds]
    if federated and name in bounds:
        score, name = federated[0]
        said += (
            f" The best federated run is <b>{escape(name)}</b>, <b>{number(score['value'])}</b> "
            f"({number(score['low'])} to {number(score['high'])}).{_against(report, name, column)}"
        )
    return said


def _against(report: Report, name: str, column: Column) -> str:
    """A run's difference to the baseline, where there is one."""
    compared = report.comparison
    for row in compared.rows if compared else []:
        if compared and (row.run, row.column) == (name, column):
            return (
                f" Against {escape(compared.baseline)}: {signed(row.difference)} ({signed(row.low)} to "
                f"{signed(row.high)}, {_p(row.adjusted)} after Holm), {row.verdict}."
            )
    return ""


def _p(value: float) -> str:
    shown = p_value(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


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
    best = {
        column: ranked[0][0]["value"]
        for column in report.headlines
        if report.side(column) and (ranked := ranking(report, column))
    }
    numbers = {column: _number(report, column) for column in report.headlines}
    heads = ["run", "strategy", *(_name(report, column) + numbers[column] for column in report.headlines)]
    rows = []
    for run in report.runs:
        cells = [
            score_cell(_score(run, column), best.get(column), told=not numbers[column])
            for column in report.headlines
        ]
        rows.append((run.name, [Cell(run.strategy), *cells]))
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


def _number(report: Report, column: Column) -> str:
    """How many questions every run answered, where that is one number."""
    numbers = {score["n"] for run in report.runs if (score := _score(run, column))}
    return f", n = {numbers.pop():.0f}" if len(numbers) == 1 else ""


def score_cell(score: Score | None, best: float | None = None, *, told: bool = True) -> Cell:
    """A score with its interval, and the number of questions where that is told."""
    if score is None:
        return NOTHING
    many = f", n = {score['n']:.0f}" if told else ""
    interval = f"{number(score['low'])} to {number(score['high'])}"
    return Cell(number(score["value"]), interval + many, score["value"] == best)


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
        f"<p>Paired bootstrap over images, at least 20,000 draws. P (Holm) is adjusted for all {len(rows)} "
        "rows; a direction is stated where it is below 0.05. Intervals cover images, not other seeds.</p>"
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
                f"{row.run}, {column[0]}: {signed(row.difference)} "
                f"({signed(row.low)} to {signed(row.high)}), {row.verdict}",
                {"better": True, "worse": False}.get(row.verdict),
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
        "difference with 95 % interval",
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
