"""Stage three's commands: answer what is not yet answered, score what is saved, print the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedcmp.evaluate.answers import answers_path, begin_answers, read_answers
from fedcmp.evaluate.benchmarks.base import Item
from fedcmp.evaluate.scoring import Scored, judged, model_of, score, write_scores
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import Work, benchmarks_of, cache_of, prepare, recall
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked
from fedcmp.pipeline.ranks import Ranks
from fedcmp.pipeline.run_folder import Run

T = TypeVar("T")

_PROBLEMS_SHOWN = 3


def evaluate_runs(
    experiments: Sequence[Experiment],
    only: tuple[str, ...],
    limit: int | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Answer what is not yet answered, score, and print the scores, run by run.

    Args:
        experiments: The runs.
        only: Names of benchmarks; all where it is empty.
        limit: Questions of each benchmark at most.
        ranks: Other processes that answer with this one, by `ranks.follow`.

    Raises:
        UserError: At the end, where a run or benchmark could not be evaluated.
    """
    runs = [(experiment.run, experiment) for experiment in experiments]
    _finish(_tried(runs, lambda experiment: evaluate_run(experiment, only, limit, ranks)), len(runs), "runs")


def score_runs(experiments: Sequence[Experiment], only: tuple[str, ...]) -> None:
    """Score saved answers again; neither caches nor models are needed.

    Raises:
        UserError: At the end, where answers of a run are missing.
    """
    runs = [(experiment.run, experiment) for experiment in experiments]
    _finish(_tried(runs, lambda experiment: _score_run(experiment, only)), len(runs), "runs")


def _tried(things: Sequence[tuple[str, T]], do: Callable[[T], object]) -> list[str]:
    """Do something with each thing by its name; the names of those that failed, which is said.

    A single one fails as it is.
    """
    failed = []
    for name, thing in things:
        try:
            do(thing)
        except UserError as error:
            if len(things) == 1:
                raise
            say(f"{name}: {error}")
            failed.append(name)
    return failed


def _finish(failed: Sequence[str], number: int, what: str) -> None:
    if failed:
        raise UserError(f"{len(failed)} of {number} {what} failed, as said above: {', '.join(failed)}")


def evaluate_run(
    experiment: Experiment, only: tuple[str, ...], limit: int | None = None, ranks: Ranks | None = None
) -> dict[str, dict[str, Any]]:
    """Answer what is not yet answered, score, and print the scores; one benchmark stops no other.

    Args:
        experiment: The run.
        only: Names of benchmarks; all where it is empty.
        limit: Questions of each benchmark at most; scores of fewer than all say so.
        ranks: Other processes that answer with this one.

    Returns:
        The content of every benchmark's file of scores.

    Raises:
        UserError: The run cannot be judged; or, at the end, a benchmark could not be evaluated.
    """
    run = trained_run(experiment)
    for name in run.judged:
        run.projector(name)
        run.adapter(name)
    benchmarks = benchmarks_of(experiment, only)
    works: list[tuple[Work, FeatureCache]] = []

    def read(name: str) -> None:
        cache = cache_of(experiment, name, benchmarks[name])
        run.require_encoding(cache)
        works.append((prepare(experiment, name, benchmarks[name], cache, limit), cache))

    unread = _tried([(name, name) for name in benchmarks], read)
    _answer(experiment, run, works, ranks)
    scores, unscored = _score(experiment, run, [work for work, _ in works])
    _finish([*unread, *unscored], len(benchmarks), "benchmarks")
    return scores


def _score_run(experiment: Experiment, only: tuple[str, ...]) -> None:
    run = trained_run(experiment, asking=False)
    benchmarks = benchmarks_of(experiment, only)
    works: list[Work] = []

    def read(name: str) -> None:
        works.append(recall(experiment, name, benchmarks[name]))

    unread = _tried([(name, name) for name in benchmarks], read)
    _, unscored = _score(experiment, run, works)
    _finish([*unread, *unscored], len(benchmarks), "benchmarks")


def _answer(
    experiment: Experiment, run: Run, works: Sequence[tuple[Work, FeatureCache]], ranks: Ranks | None
) -> None:
    """Append the answers that are not yet saved."""
    pending: list[tuple[str, Path, list[tuple[Work, FeatureCache, list[Item]]]]] = []
    for projector in run.judged:
        model = model_of(run, projector)
        path = answers_path(experiment.scores_path, projector, model)
        saved = read_answers(path, model)
        if saved.unreadable:
            say(f"{path}: {saved.unreadable} unreadable lines; what they answered is asked again")
        left = []
        for work, cache in works:
            if projector not in judged(run, work):
                continue
            mode = work.benchmark.mode
            todo = [item for item in work.items if not saved.knows(work.keys[item.id], mode)]
            if todo:
                # What is retrieved depends on all the rest.
                left.append((work, cache, work.items if mode == "retrieve" else todo))
        if left:
            pending.append((projector, path, left))
    if not pending:
        say(f"{experiment.run}: nothing to answer, every answer is saved")
        return
    from fedcmp.evaluate.answering import answer, load_reader
    from fedcmp.evaluate.ranks import answer_together

    total = sum(len(items) for _, _, left in pending for _, _, items in left)
    with (
        locked(experiment.scores_path / ".lock", str(experiment.scores_path)),
        progress(f"{experiment.run}: answers", total, "answers") as task,
    ):
        for projector, path, left in pending:
            begin_answers(path, model_of(run, projector))
            for work, cache, items in left:
                if ranks is not None:
                    answer_together(experiment, run, projector, work, cache, items, path, task.advance, ranks)
                    continue
                reader = load_reader(experiment, run, projector, cache)
                answer(work, items, reader, path, task.advance)


def _score(
    experiment: Experiment, run: Run, works: Sequence[Work]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Score works and print the scores; what was scored, and the names of what could not be."""
    scores: dict[str, dict[str, Any]] = {}
    rows: list[list[str]] = []

    def one(work: Work) -> None:
        scored = score(experiment, run, work)
        scores[work.name] = scored.content
        for path in write_scores(experiment, work, scored):
            say(f"{work.name}: for the official evaluation: {path}")
        for name, each in scored.content["metrics"].items():
            interval = f"{each['low']:.3f} - {each['high']:.3f}"
            whose = work.name if work.limit is None else f"{work.name}, first {work.limit}"
            rows.append([f"{whose}: {name}", f"{each['value']:.3f}", interval, str(each["n"])])
        _say_counts(work, scored)

    failed = _tried([(work.name, work) for work in works], one)
    if works:
        table(f"Scores of {experiment.run}", ["metric", "value", "95 % interval", "n"], rows)
        say(f"Answers and scores in {experiment.scores_path}")
    return scores, failed


def _say_counts(work: Work, scored: Scored) -> None:
    counts = scored.content["counts"]
    if work.limit is not None:
        say(f"{work.name}: LIMITED to its first {work.limit} questions; these are not the benchmark's scores")
    for what in ("missing images", "duplicate ids", "bad entries", "failed items"):
        if counts[what]:
            say(f"{work.name}: {counts[what]} {what} not scored")
        if what == "missing images" and work.missing:
            named = list(dict.fromkeys(work.missing))
            more = f" and {len(named) - _PROBLEMS_SHOWN:,} more" if len(named) > _PROBLEMS_SHOWN else ""
            say(f"  {', '.join(named[:_PROBLEMS_SHOWN])}{more}")
    if counts["images trained on"]:
        say(f"{work.name}: {counts['images trained on']} of its images were trained on too, byte for byte")
    if counts["empty answers"]:
        say(f"{work.name}: {counts['empty answers']} empty answers, scored by the rule as they are")
    said = counts["items"] * counts["projectors"]
    for what, number in scored.content["remarks"].items():
        say(f"{work.name}: {number} {what} among {said} ({number / said:.0%})")
    for warning in scored.content["warnings"]:
        say(f"{work.name}: {warning}")
    for reason in [*work.problems, *scored.reasons][:_PROBLEMS_SHOWN]:
        say(f"  {reason}")
