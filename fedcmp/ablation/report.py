"""Tables and plots of an ablation: means over seeds, paired differences, what memoisation saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from fedcmp.ablation import contest
from fedcmp.ablation.edges import Tried, at_edges, numbers
from fedcmp.ablation.file import Ablation, Chosen, Trial
from fedcmp.ablation.sweep import Finished
from fedcmp.evaluate.report.charts import dots
from fedcmp.evaluate.statistics import Difference, holm, paired
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.run_folder import read_history

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Section:
    """One ablation's part of the report; plots are SVG by file name."""

    markdown: str
    plots: dict[str, str]


def section(finished: Finished) -> Section:
    """Print an ablation's tables and write them as Markdown; what diverged is listed, not ranked."""
    ablation, trials, failures = finished.ablation, finished.trials, finished.failures
    tested = ablation.measures[0]
    lines = [f"## {ablation.title or ablation.name}", "", *_setting(ablation, finished.tried), ""]
    plots: dict[str, str] = {}
    against_subject: dict[str, dict[str, Difference]] = {}
    tested_values: dict[str, Values] = {}
    for scenario in ablation.scenarios:
        scores = _scores(ablation, [t for t in trials if t.scenario == scenario], failures)
        values = tested_values[scenario] = scores[tested]
        if not values:
            lines += [f"### {scenario}", "", "Every run diverged.", ""]
            continue
        order = sorted(values, key=lambda name: ablation.sign * fmean(values[name]))
        against_subject[scenario] = {
            name: paired(values[ablation.subject], values[name])
            for name in order
            if ablation.subject in values and name != ablation.subject and name not in ablation.bounds
        }
        columns, body = _table(
            ablation, order, scores, {name: finished.tuned[scenario, name] for name in order}
        )
        what = f"{len(ablation.seeds)} seeds, {tested} ({ablation.better} is better)"
        table(f"{ablation.name}, {scenario}: {what}", columns, body)
        name = f"{ablation.name}-{scenario}.svg"
        plots[name] = dots({each: values[each] for each in order}, f"{tested}, a dot a seed")
        lines += [f"### {scenario}", "", *_markdown(columns, body), "", f"![{scenario}](results/{name})", ""]
    lines += _contest(ablation, tested_values)
    lines += _verdict(ablation, against_subject)
    lines += [f"- not tuned: {each}" for each in at_edges(ablation, finished.tuned, finished.tried)]
    lines += [f"- diverged: {run}: {why}" for run, why in sorted(failures.items())]
    saved = _saved(trials)
    if saved:
        say(saved)
        lines += ["", saved]
    return Section("\n".join([*lines, ""]), plots)


def _contest(ablation: Ablation, values: Mapping[str, Values]) -> list[str]:
    if ablation.contest is None:
        return []
    columns, body = contest.rows(ablation, values)
    tested, number = ablation.measures[0], len(ablation.seeds)
    what = (
        f"Ratios of {tested}, the geometric mean over {number} seeds with its 95 % interval; below 1 "
        f"{ablation.subject} is better. P by sign flips, adjusted (Holm) over rivals in the column of all "
        "scenarios and over scenarios in the others, which also say in how many seeds it is lower."
    )
    table(f"{ablation.name}: {ablation.subject} against its rivals", columns, body)
    return ["### The contest", "", what, "", *_markdown(columns, body), ""]


def _setting(ablation: Ablation, tried: Mapping[tuple[str, str], Tried]) -> list[str]:
    """What was run, and which options were there to choose from."""
    means = [f"{name} is the mean of {', '.join(parts)}." for name, parts in ablation.means.items()]
    what = f"Seeds {_listed(ablation.seeds)}; {', '.join(ablation.measures)} on test data."
    lines = [" ".join([what, *means])]
    lines += [f"Every run has `{override}`." for override in ablation.set if not override.startswith("memo")]
    tuning = ablation.tuning
    if tuning is None:
        return lines
    lines[0] += f" Options were chosen by {tuning.measure} on seeds {_listed(tuning.seeds)} from:"
    for name, options in ablation.strategies.items():
        choices = [
            f"{key} {_listed(value)}"
            for key, value in options.items()
            if isinstance(value, list) and len(value) > 1
        ]
        if choices:
            lines.append(f"- {name}: {'; '.join(choices)}")
    further = [f"{place}: {what}" for place, what in _beyond(ablation, tried)]
    if further:
        lines += [
            "",
            "Beyond an end of a grid where the best lay, until the next was no better:",
            "",
            *further,
        ]
    return [lines[0], "", *lines[1:]]


def _beyond(ablation: Ablation, tried: Mapping[tuple[str, str], Tried]) -> Iterator[tuple[str, str]]:
    """What was tried beyond the grids, and where."""
    for (scenario, strategy), options in tried.items():
        for name, given in numbers(ablation, strategy).items():
            more = [value for value in options[name] if value not in given]
            if more:
                yield f"- {strategy}, {scenario}", f"{name} {_listed(more)}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def write(out: Path, sections: Sequence[Section], configs: Sequence[Path]) -> None:
    """Write the report, with its plots in `results/` beside it."""
    made_by = provenance("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in made_by["packages"].items())
    files = " ".join(map(str, configs))
    header = [
        "# Results",
        "",
        f"Written by `fedcmp ablate {files} --out {out}` with Python {made_by['python']}, {versions}, "
        f"on {made_by['platform']}. Spread is the standard deviation over seeds; intervals are 95 % t "
        "intervals of paired differences over seeds; p values are adjusted for the number of strategies "
        "(Holm), and words are bold where they hold after that. Fed-CMP and PivotMerge are our readings of "
        "papers of which we had the abstracts.",
        "",
    ]
    for each in sections:
        for name, svg in each.plots.items():
            write_atomic(out.parent / "results" / name, svg.encode())
    write_atomic(out, "\n".join([*header, *(each.markdown for each in sections)]).encode())


def _scores(ablation: Ablation, trials: Sequence[Trial], failures: Mapping[Path, str]) -> dict[str, Values]:
    """Values by measure and strategy, in the order of seeds, of the strategies without a failure."""
    failed = {trial.strategy for trial in trials if trial.experiment.run_path in failures}
    scores: dict[str, Values] = {measure: defaultdict(list) for measure in ablation.measures}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        if trial.strategy not in failed:
            for measure in ablation.measures:
                scores[measure][trial.strategy].append(trial.score(*ablation.parts(measure)))
    return scores


def _table(
    ablation: Ablation, order: Sequence[str], scores: Mapping[str, Values], options: Mapping[str, Chosen]
) -> tuple[list[str], list[list[str]]]:
    tested, *others = ablation.measures
    values = scores[tested]
    rivals = [
        name
        for name in order
        if ablation.baseline in values and name != ablation.baseline and name not in ablation.bounds
    ]
    differences = {name: paired(values[name], values[ablation.baseline]) for name in rivals}
    adjusted = dict(zip(rivals, holm([differences[name].p for name in rivals]), strict=True))
    columns = ["strategy", "options", tested, "spread", f"minus {ablation.baseline}", "p (Holm)", *others]
    body = [
        [
            name,
            ", ".join(
                f"{key} {value}"
                for key, value in options[name]
                if key != "name" and not isinstance(value, (dict, list))
            ),
            f"{fmean(values[name]):.3f}",
            f"{stdev(values[name]):.3f}",
            _interval(differences[name]) if name in differences else "",
            f"{adjusted[name]:.3f}" if name in adjusted else "",
            *(f"{fmean(scores[measure][name]):.3f}" for measure in others),
        ]
        for name in order
    ]
    return columns, body


def _interval(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _verdict(ablation: Ablation, against: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Where the subject wins, loses, or cannot be told apart, by 95 % intervals; bold after Holm."""
    words = {scenario: _words(ablation.sign, differences) for scenario, differences in against.items()}
    rivals = [name for name in ablation.strategies if name not in (ablation.subject, *ablation.bounds)]
    rows = [
        [
            name,
            *(
                f"{words[scenario][name]} {_interval(differences[name])}"
                if name in differences
                else "diverged"
                for scenario, differences in against.items()
            ),
        ]
        for name in rivals
    ]
    summary = []
    for scenario, of in words.items():
        named = {kind: [name for name, word in of.items() if kind in word] for kind in ("open", "worse")}
        better = len(of) - len(named["open"]) - len(named["worse"])
        summary.append(
            f"- {scenario}: better than {better} of {len(of)}; cannot be told from "
            f"{_listed(named['open']) or 'none'}; worse than {_listed(named['worse']) or 'none'}."
        )
    title = f"### {ablation.subject} against every other strategy"
    return [title, "", *_markdown([f"{ablation.subject} minus", *against], rows), "", *summary, ""]


def _words(sign: int, differences: Mapping[str, Difference]) -> dict[str, str]:
    adjusted = holm([difference.p for difference in differences.values()])
    words = {}
    for (name, difference), p in zip(differences.items(), adjusted, strict=True):
        low, high = sorted((sign * difference.low, sign * difference.high))
        word = "better" if high < 0 else "worse" if low > 0 else "open"
        words[name] = f"**{word}**" if p < 0.05 else word
    return words


def _saved(trials: Sequence[Trial]) -> str:
    """What equal local updates, computed once, saved: seconds of training, as measured when computed.

    Empty where no run has local updates, as alignments have none.
    """
    spent = saved = 0.0
    for trial in trials:
        for row in read_history(trial.experiment.run_path):
            seconds = row.get("seconds") or 0.0
            if row.get("recalled"):
                saved += seconds
            elif row["client"] is not None:
                spent += seconds
    whole = spent + saved
    if not whole:
        return ""
    return (
        f"Local training: {spent:,.0f} s computed, {saved:,.0f} s ({saved / whole:.0%}) recalled "
        f"instead of computed again, over {len(trials)} runs."
    )
