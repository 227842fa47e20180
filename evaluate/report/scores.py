"""The sections with scores: the best run of every benchmark, comparisons, all figures, groups."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean, pstdev

from fedcmp.evaluate.report.charts import Span, forest
from fedcmp.evaluate.report.results import PART, Column, Grouped, Report, RunResult, Score, Versus
from fedcmp.evaluate.report.tables import NOTHING, Cell, folded, number, p_value, signed, table

# Strategies that are no federation, and what an untrained run is called.
BOUNDS = ("centralised", "local_only", "none")


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
    """The best federated run against the baseline; then the bounds, which are none."""
    ranked = ranking(report, column)
    bounds = [(score, name) for score, name in ranked if _strategy(report, name) in BOUNDS]
    federated = [each for each in ranked if each not in bounds]
    shown = federated or bounds
    score = shown[0][0]
    best = [name for each, name in shown if each["value"] == score["value"]]
    benchmark, metric = column
    what = f"the best of {len(shown)} {'federated runs' if federated else 'runs'}, " if len(shown) > 1 else ""
    said = (
        f"<b>{escape(benchmark)}</b> ({escape(metric)}, {report.side(column)} is better): "
        f"<b>{escape(' and '.join(best))}</b> {'have' if len(best) > 1 else 'has'} {what}"
        f"<b>{number(score['value'])}</b> ({number(score['low'])} to {number(score['high'])}, "
        f"n = {score['n']:.0f}).{_against(report, best[0], column)}"
    )
    if federated and bounds:
        told = ", ".join(f"{escape(name)} {number(each['value'])}" for each, name in bounds)
        said += f" Without federation: {told}."
    others = [run.name for run in report.runs if benchmark in run.others]
    if others:
        said += f" Not ranked, as they answered under other conditions: {escape(', '.join(others))}."
    return said


def _strategy(report: Report, name: str) -> str:
    return next(run.strategy for run in report.runs if run.name == name)


def _against(report: Report, name: str, column: Column) -> str:
    """A run's difference to the baseline, where there is one."""
    compared = report.comparison
    for row in compared.rows if compared else []:
        if compared and (row.run, row.column) == (name, column):
            return (
                f" Against {escape(compared.baseline)} that is {signed(row.difference)} "
                f"({signed(row.low)} to {signed(row.high)}, adjusted {_p(row.adjusted)}): "
                f"<b>{row.verdict}</b>."
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
            score_cell(
                _score(run, column),
                best.get(column),
                told=not numbers[column],
                limit=run.limits.get(column[0]),
            )
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


def score_cell(
    score: Score | None, best: float | None = None, *, told: bool = True, limit: int | None = None
) -> Cell:
    """A score with its interval, the number of questions where that is told, and a limit if there was one."""
    if score is None:
        return NOTHING
    many = f", n = {score['n']:.0f}" if told else ""
    many += f", first {limit} questions" if limit else ""
    interval = f"{number(score['low'])} to {number(score['high'])}"
    return Cell(number(score["value"]), interval + many, score["value"] == best)


def _all(report: Report) -> str:
    heads = ["benchmark: metric", *(run.name for run in report.runs)]
    rows = [
        (
            ": ".join(column),
            [score_cell(_score(run, column), limit=run.limits.get(column[0])) for run in report.runs],
        )
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
        f"{chart}{folded('Every difference', table(what, heads, rows), opened=True)}{left}"
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
    shown = _training(report.runs)
    by_kind: dict[str, list[Grouped]] = {}
    for each in report.groups:
        by_kind.setdefault(each.what, []).append(each)
    for what, groups in by_kind.items():
        names = {name for each in groups for scores in each.scores.values() for name in scores}
        if len(names) == 1:
            tables = _of_one_run(names.pop(), what, groups)
        else:
            tables = "".join(_group(report, each) for each in groups)
        shown += folded(f"Scores by {what}", tables, opened=what != PART)
    return shown


def _of_one_run(run: str, what: str, groups: Sequence[Grouped]) -> str:
    """All metrics of a run in one table."""
    names = dict.fromkeys(name for each in groups for name in each.scores)
    cells = {name: [score_cell(each.scores.get(name, {}).get(run)) for each in groups] for name in names}
    heads = [what, *(": ".join(each.column) for each in groups)]
    return table(
        f"{run} by {what}", heads, [*cells.items(), *_spread(groups, [run] * len(groups))], "grouped"
    )


def _spread(groups: Sequence[Grouped], runs: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    """Mean, worst group and standard deviation between groups, a column a metric and run."""
    mean, worst, spread = [], [], []
    for group, run in zip(groups, runs, strict=True):
        values = [scores[run]["value"] for scores in group.scores.values() if run in scores]
        chosen = {"higher": min, "lower": max}.get(group.better or "")
        mean.append(Cell(number(fmean(values))))
        worst.append(Cell(number(chosen(values))) if chosen else NOTHING)
        spread.append(Cell(number(pstdev(values))))
    return [("mean", mean), ("worst", worst), ("standard deviation", spread)]


def _training(runs: Sequence[RunResult]) -> str:
    names = dict.fromkeys(silo for run in runs for silo in run.silos)
    if not names:
        return ""
    last = {run.name: _last_losses(run) for run in runs}
    shown = [run.name for run in runs if last[run.name].keys() & names.keys()]
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
    rows += _spread([group] * len(runs), runs)
    return table(f"{': '.join(group.column)} by {group.what}{arrow}", [group.what, *runs], rows, "grouped")
