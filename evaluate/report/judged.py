"""Runs as they were evaluated: scores that still fit, answers, and what stands in their manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedcmp.evaluate.benchmarks.base import Benchmark
from fedcmp.evaluate.compare import Answered
from fedcmp.evaluate.report.provenance import facts_of
from fedcmp.evaluate.report.results import Column, RunResult
from fedcmp.evaluate.scoring import given, read_scores
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import benchmarks_of, recall
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.run_folder import Run

_EXPECTED = ("items", "projectors")
_OF_THE_RUN = ("seed", "answers")


@dataclass(frozen=True)
class Judged:
    """One run with what it was asked and what it said, where it was asked at all."""

    experiment: Experiment
    benchmarks: dict[str, Benchmark]
    answered: dict[str, Answered]
    contents: dict[str, dict[str, Any]]
    result: RunResult


def judged_runs(experiments: Sequence[Experiment]) -> tuple[list[Judged], dict[str, str]]:
    """The runs that are evaluated, and why the others are not, by name.

    Raises:
        UserError: None is evaluated, one was trained with another configuration, or scores do not fit what
            they should be of.
    """
    runs, absent = [], {}
    for experiment in experiments:
        path = experiment.run_path
        if Run.find(path, experiment.federate.projector.plugins) is None:
            absent[experiment.run] = f"{path}: no finished run here; run 'fedcmp federate' first"
            continue
        run = _judged(experiment)
        if run.answered:
            runs.append(run)
        else:
            absent[experiment.run] = f"run '{experiment.run}' has no scores; run 'fedcmp evaluate' first"
    if not runs:
        raise UserError(next(iter(absent.values())))
    _mark_others(runs)
    return runs, absent


def _judged(experiment: Experiment) -> Judged:
    trained = trained_run(experiment, asking=False)
    silos = {silo: counts["samples"] for silo, counts in trained.manifest.get("texts", {}).items()}
    facts = facts_of(experiment, trained)
    strategy = trained.manifest["strategy"]
    result = RunResult(
        experiment.run,
        strategy,
        {},
        [],
        {},
        trained.history,
        facts=facts,
        silos=silos,
        sampled=trained.sampled,
    )
    run = Judged(experiment, benchmarks_of(experiment), {}, {}, result)
    for name, benchmark in run.benchmarks.items():
        if not (experiment.scores_path / f"{name}.json").is_file():
            result.notes[name] = "no scores; run 'fedcmp evaluate'"
            continue
        work = recall(experiment, name, benchmark)
        content = read_scores(experiment, trained, work)
        run.answered[name] = Answered(experiment, work, given(experiment, trained, work))
        run.contents[name] = content
        if work.limit is not None:
            result.limits[name] = work.limit
        result.warnings[name] = content["warnings"]
        result.scores[name] = content["metrics"]
        result.notes[name] = "; ".join(filter(None, [_judges(benchmark), _note(content)]))
        # In the benchmark's own order, the chief one first.
        for metric in (each for each in benchmark.headlines if each in content["headlines"]):
            result.headlines.append((name, metric))
            better = benchmark.better(metric)
            if better is not None:
                result.better[name, metric] = better
    return run


def _judges(benchmark: Benchmark) -> str:
    """Whose task a benchmark is, where it is not everybody's."""
    return f"task of {', '.join(benchmark.silos)}" if benchmark.silos else ""


def _note(content: dict[str, Any]) -> str:
    """What a score must not be quoted without, and what was not scored."""
    settings = [f"{what}: {value}" for what, value in content["settings"].items()]
    left_out = [
        f"{number} {what}" for what, number in content["counts"].items() if what not in _EXPECTED and number
    ]
    projectors = content["counts"]["projectors"]
    several = [f"mean over {projectors} projectors"] if projectors > 1 else []
    said = content["counts"]["items"] * projectors
    remarks = [f"{number} {what} ({number / said:.0%})" for what, number in content["remarks"].items()]
    return "; ".join([*several, *settings, *left_out, *remarks, *content["warnings"]])


def _mark_others(runs: Sequence[Judged]) -> None:
    """Note where scores beside each other are of other questions, labels, rules or options, or are none."""
    names = dict.fromkeys(name for run in runs for name in run.benchmarks)
    first: dict[str, Judged] = {}
    for run in runs:
        for name in names:
            run.result.notes.setdefault(name, "not among this run's benchmarks")
        for name, content in run.contents.items():
            model = first.setdefault(name, run)
            theirs = model.contents[name]["made_of"]
            ours = content["made_of"]
            keys = [key for key in dict.fromkeys([*ours, *theirs]) if key not in _OF_THE_RUN]
            # An option that a file from before there was such a choice lacks is none.
            changed = [key for key in keys if differences(theirs.get(key), ours.get(key))]
            if changed:
                note = f"not comparable with '{model.result.name}': other {', '.join(changed)}"
                run.result.others[name] = note
                run.result.notes[name] = "; ".join(filter(None, [note, run.result.notes[name]]))


def columns_of(results: Sequence[RunResult]) -> list[Column]:
    """Every (benchmark, metric), in the order of the configuration."""
    return list(
        dict.fromkeys(
            (benchmark, metric)
            for result in results
            for benchmark, metrics in result.scores.items()
            for metric in metrics
        )
    )
