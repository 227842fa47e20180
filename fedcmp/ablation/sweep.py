"""Many runs over the same caches, equal local training done once."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedcmp.ablation.file import Ablation, Chosen, Trial, component, grid, plugins_of, trial
from fedcmp.ablation.processes import Crew, crew, machine
from fedcmp.extract.workers import Worker, parse

if TYPE_CHECKING:
    from concurrent.futures import Future

_CLAIM = ".ablate.lock"
_POLL = 0.5


@dataclass(frozen=True)
class _Done:
    """What came of a trial.

    Attributes:
        failure: Why it diverged, if it did.
        seconds: CPU seconds that it took.
        busy: The lock file of another process that is at work on it, if one is.
    """

    failure: str = ""
    seconds: float = 0.0
    busy: Path | None = None


Work = Callable[[Trial, tuple[str, ...], Path], _Done]


@dataclass(frozen=True)
class Finished:
    """What an ablation's runs came to; their scores are in their files.

    Attributes:
        ablation: What was compared.
        trials: All its runs.
        failures: Why runs diverged, by run.
        tuned: The options of every (scenario, strategy).
    """

    ablation: Ablation
    trials: list[Trial]
    failures: dict[Path, str]
    tuned: dict[tuple[str, str], Chosen]


def sweep(
    ablations: Sequence[Ablation], jobs: int | None = None, worker: str | None = None
) -> Iterator[Finished]:
    """Do all runs of ablations that are not done yet, one ablation after the other.

    Any number of these may be at work on the same files. Each begins with runs of its own, goes on with those
    that nobody has begun or whose process was killed, and waits in the end for those of others: what comes
    next may depend on their scores.

    Args:
        ablations: What to compare.
        jobs: Runs at a time; by default one on each GPU or, without any, core.
        worker: `i/n` or `auto` (`extract.workers`), where several share the work.

    Raises:
        UserError: An option or measure of any of them is wrong, before anything is computed; a process was
            killed.
    """
    us = Worker(0, 1) if worker is None else parse(worker, os.environ)
    for ablation in ablations:
        _check(ablation)
    with crew(jobs, us, machine(us, worker == "auto", os.environ)) as pool:
        for ablation in ablations:
            number = "" if worker is None else f"-{us.index}-of-{us.count}"
            log = Path("build/ablations") / f"{ablation.name}{number}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            tuned, failures = _tuned(pool, ablation, log)
            trials = list(_trials(ablation, tuned))
            failures |= _run_all(pool, ablation, trials, log, _benchmarks(ablation.measures))
            yield Finished(ablation, trials, failures, tuned)


def _trials(ablation: Ablation, tuned: dict[tuple[str, str], Chosen]) -> Iterator[Trial]:
    # All scenarios and seeds of one strategy first, so that the next finds their common rounds done.
    for strategy in ablation.strategies:
        for scenario in ablation.scenarios:
            for seed in ablation.seeds:
                yield trial(ablation, scenario, strategy, seed, tuned[scenario, strategy])


def _check(ablation: Ablation) -> None:
    """Find mistakes in options and measures before anything is computed."""
    from fedcmp.evaluate.work import benchmarks_of
    from fedcmp.federate.strategies.base import STRATEGIES
    from fedcmp.pipeline.options import Component

    plugins = {scenario: plugins_of(ablation, scenario) for scenario in ablation.scenarios}
    for strategy in ablation.strategies:
        for options in grid(ablation, strategy):
            own = Component.model_validate(component(strategy, options))
            for scenario in ablation.scenarios:
                STRATEGIES.build(own.with_plugins(plugins[scenario]), f"strategies.{strategy}")
                experiment = trial(ablation, scenario, strategy, ablation.seeds[0], options).experiment
                measures = [*ablation.measures, *([ablation.tuning.measure] if ablation.tuning else [])]
                benchmarks_of(experiment, _benchmarks(measures))


def _tuned(
    pool: Crew, ablation: Ablation, log: Path
) -> tuple[dict[tuple[str, str], Chosen], dict[Path, str]]:
    """Options of every strategy in every scenario, chosen where there is a choice; and what diverged."""
    places = [(scenario, name) for name in ablation.strategies for scenario in ablation.scenarios]
    left = {(scenario, name): list(grid(ablation, name)) for scenario, name in places}
    failures: dict[Path, str] = {}
    if ablation.tuning is not None:
        seeds, first = ablation.tuning.seeds, ablation.tuning.screened or len(ablation.tuning.seeds)
        totals: dict[tuple[str, str], dict[Chosen, float]] = defaultdict(lambda: defaultdict(float))
        for some in (seeds[:first], seeds[first:]):
            trials = [
                trial(ablation, *place, seed, options)
                for place, choices in left.items()
                for options in choices
                for seed in some
                if len(choices) > 1
            ]
            failures |= _run_all(pool, ablation, trials, log, _benchmarks([ablation.tuning.measure]))
            for each in trials:
                totals[each.scenario, each.strategy][each.options] += _cost(ablation, each, failures)
            left = {
                place: sorted(choices, key=totals[place].__getitem__)[: -(-len(choices) // 4)]
                for place, choices in left.items()
            }
        left = {place: [min(choices, key=totals[place].__getitem__)] for place, choices in left.items()}
    return {place: choices[0] for place, choices in left.items()}, failures


def _cost(ablation: Ablation, tried: Trial, failures: Mapping[Path, str]) -> float:
    """What tuning minimises; whatever diverged is worst."""
    assert ablation.tuning is not None
    if tried.experiment.run_path in failures:
        return float("inf")
    return ablation.sign * tried.score(ablation.tuning.measure)


def _benchmarks(measures: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(measure.split(": ", 1)[0] for measure in measures))


def _run_all(
    pool: Crew, ablation: Ablation, trials: list[Trial], log: Path, benchmarks: tuple[str, ...]
) -> dict[Path, str]:
    """Extract, train and score; returns why runs diverged, if any did."""
    caches = list({trial.experiment.features: trial for trial in trials}.values())
    _each(pool, _extract, caches, benchmarks, log, f"{ablation.name}: caches")
    return _each(pool, _run, trials, benchmarks, log, f"{ablation.name}: runs")


def _each(
    pool: Crew,
    work: Work,
    trials: list[Trial],
    benchmarks: tuple[str, ...],
    log: Path,
    title: str,
) -> dict[Path, str]:
    from concurrent.futures import FIRST_COMPLETED, wait
    from concurrent.futures.process import BrokenProcessPool

    from fedcmp.pipeline.console import progress, say
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.files import is_locked

    failures = {}
    seconds = 0.0
    others: dict[Path, list[Trial]] = defaultdict(list)
    futures: dict[Future[_Done], Trial] = {}
    with progress(title, len(trials), "runs") as task:
        # Own ones first: two workers seldom want the same, and neither is idle while anything is left.
        own = sorted(range(len(trials)), key=lambda place: (place - pool.worker.index) % pool.worker.count)
        begin = [trials[place] for place in own]
        try:
            while begin or futures or others:
                futures |= {pool.submit(work, trial, benchmarks, log): trial for trial in begin}
                finished, _ = wait(futures, _POLL if others else None, FIRST_COMPLETED)
                for future in finished:
                    done, tried = future.result(), futures.pop(future)
                    seconds += done.seconds
                    if done.busy is not None:
                        others[done.busy].append(tried)
                        continue
                    if done.failure:
                        failures[tried.experiment.run_path] = done.failure
                        say(f"{tried.experiment.run_path}: {done.failure}")
                    task.advance()
                if others and not futures:
                    task.note(f"waiting for {sum(map(len, others.values()))} of other workers")
                    time.sleep(_POLL)
                free = [lock for lock in others if not is_locked(lock)]
                begin = [trial for lock in free for trial in others.pop(lock)]
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a process was killed, perhaps for lack of memory; run the same command with "
                "fewer --jobs to go on"
            ) from None
    if trials:
        say(f"{title}: {seconds:,.0f} CPU s, {seconds / len(trials):.1f} each")
    return failures


def _extract(trial: Trial, benchmarks: tuple[str, ...], log: Path) -> _Done:
    from fedcmp.extract.run import run
    from fedcmp.pipeline.errors import BusyError
    from fedcmp.pipeline.files import locked

    began, claim = time.process_time(), trial.experiment.features / _CLAIM
    try:
        with locked(claim, str(trial.experiment.features)), _logged(log):
            run(trial.experiment, only=(), overwrite=False)
    except BusyError:
        return _Done(busy=claim)
    return _Done(seconds=time.process_time() - began)


def _run(trial: Trial, benchmarks: tuple[str, ...], log: Path) -> _Done:
    from fedcmp.evaluate.run import evaluate_run
    from fedcmp.federate.run import run
    from fedcmp.pipeline.errors import BusyError, DivergedError
    from fedcmp.pipeline.files import locked

    began, failure, out = time.process_time(), "", trial.experiment.run_path
    try:
        # Of training and scores together; a run that diverged leaves neither, and whoever comes next tries.
        with locked(out / _CLAIM, str(out)), _logged(log):
            run(trial.experiment)
            evaluate_run(trial.experiment, benchmarks)
    except BusyError:
        return _Done(busy=out / _CLAIM)
    except DivergedError as error:
        failure = str(error)
    return _Done(failure, time.process_time() - began)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what the stages print to a file."""
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield
