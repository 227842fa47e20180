"""Many runs over the same caches, equal local training done once."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedcmp.ablation.edges import Tried, at_edges, beyond, edges, numbers
from fedcmp.ablation.file import Ablation, Chosen, Trial, component, grid, plugins_of, trial
from fedcmp.ablation.processes import Crew, crew, machine
from fedcmp.extract.workers import Worker, parse
from fedcmp.pipeline.hashes import fingerprint

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


_FURTHEST = 8

Work = Callable[[Trial, tuple[str, ...], Path], _Done]


@dataclass(frozen=True)
class Finished:
    """What an ablation's runs came to; their scores are in their files.

    Attributes:
        ablation: What was compared.
        trials: All its runs.
        failures: Why runs diverged, by run.
        tuned: The options of every (scenario, strategy).
        tried: The numbers that they were chosen from.
    """

    ablation: Ablation
    trials: list[Trial]
    failures: dict[Path, str]
    tuned: dict[tuple[str, str], Chosen]
    tried: dict[tuple[str, str], Tried]


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
        UserError: An option or measure of any of them is wrong, before anything is computed; a best value
            lies at the edge of its grid; a process was killed.
    """
    us = Worker(0, 1) if worker is None else parse(worker, os.environ)
    for ablation in ablations:
        _check(ablation)
    with crew(jobs, us, machine(us, worker == "auto", os.environ)) as pool:
        for ablation in ablations:
            number = "" if worker is None else f"-{us.index}-of-{us.count}"
            log = Path("build/ablations") / f"{ablation.name}{number}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            tuned = _tuned(pool, ablation, log)
            _require_tuned(ablation, tuned)
            trials = list(_trials(ablation, tuned.chosen))
            failures = _run_all(pool, ablation, trials, log, ablation.benchmarks(ablation.measures))
            yield Finished(ablation, trials, tuned.failures | failures, tuned.chosen, tuned.tried)


def _require_tuned(ablation: Ablation, tuned: _Tuned) -> None:
    """Refuse to go on to the results with options whose best value may lie beyond their grid.

    Raises:
        UserError: Naming them.
    """
    from fedcmp.pipeline.errors import UserError

    found = list(at_edges(ablation, tuned.chosen, tuned.tried))
    if found and ablation.tuning is not None and ablation.tuning.edges != "report":
        raise UserError(
            f"{ablation.name}: {len(found)} options were not tuned, as their best values lie at the edges of "
            "their grids; nothing was done with the seeds of the results. Extend the grids, or say [tuning] "
            f"edges = 'extend' or 'report': {'; '.join(found)}"
        )


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
                benchmarks_of(experiment, ablation.benchmarks(measures))


@dataclass
class _Tuned:
    """What tuning has found, by (scenario, strategy).

    Attributes:
        chosen: Options.
        tried: The numbers that they were chosen from.
        failures: Why runs diverged.
    """

    chosen: dict[tuple[str, str], Chosen]
    tried: dict[tuple[str, str], Tried]
    failures: dict[Path, str]


def _tuned(pool: Crew, ablation: Ablation, log: Path) -> _Tuned:
    """Options of every strategy in every scenario, chosen where there is a choice."""
    places = [(scenario, name) for name in ablation.strategies for scenario in ablation.scenarios]
    left = {(scenario, name): list(grid(ablation, name)) for scenario, name in places}
    tried = {(scenario, name): numbers(ablation, name) for scenario, name in places}
    if ablation.tuning is None:
        return _Tuned({place: choices[0] for place, choices in left.items()}, tried, {})
    seeds, first = ablation.tuning.seeds, ablation.tuning.screened or len(ablation.tuning.seeds)
    costs = _Costs(pool, ablation, log)
    for some in (seeds[:first], seeds[first:]):
        costs.add({place: choices for place, choices in left.items() if len(choices) > 1}, some)
        left = {
            place: sorted(choices, key=partial(costs.of, place))[: -(-len(choices) // 4)]
            for place, choices in left.items()
        }
    chosen = {place: min(choices, key=partial(costs.of, place)) for place, choices in left.items()}
    found = _Tuned(chosen, tried, costs.failures)
    if ablation.tuning.edges == "extend":
        _extend(ablation, found, costs)
    return found


class _Costs:
    """What tuning minimises: sums over seeds, by (scenario, strategy) and options."""

    def __init__(self, pool: Crew, ablation: Ablation, log: Path) -> None:
        self._pool, self._ablation, self._log = pool, ablation, log
        self._sums: dict[str, float] = defaultdict(float)
        self.failures: dict[Path, str] = {}

    def of(self, place: tuple[str, str], options: Chosen) -> float:
        """The sum over the seeds that some options of a (scenario, strategy) were tried with."""
        return self._sums[fingerprint([*place, options])]

    def add(self, choices: Mapping[tuple[str, str], Sequence[Chosen]], seeds: Sequence[int]) -> None:
        """Those of some choices with some seeds."""
        ablation = self._ablation
        assert ablation.tuning is not None
        trials = [
            trial(ablation, *place, seed, options)
            for place, some in choices.items()
            for options in some
            for seed in seeds
        ]
        measured = ablation.benchmarks([ablation.tuning.measure])
        self.failures |= _run_all(self._pool, ablation, trials, self._log, measured)
        for each in trials:
            key = fingerprint([each.scenario, each.strategy, each.options])
            self._sums[key] += _cost(ablation, each, self.failures)


def _extend(ablation: Ablation, found: _Tuned, costs: _Costs) -> None:
    """Try the next number beyond every edge, one option at a time, until none of them is better."""
    assert ablation.tuning is not None
    for _ in range(_FURTHEST):
        further: dict[tuple[str, str], dict[str, Chosen]] = defaultdict(dict)
        for place, chosen in found.chosen.items():
            for name in edges(found.tried[place], chosen):
                next_ones = beyond(found.tried[place][name], dict(chosen)[name])
                options = _possible(ablation, place, chosen, name, next_ones)
                if options is not None:
                    further[place][name] = options
        if not further:
            return
        costs.add({place: list(each.values()) for place, each in further.items()}, ablation.tuning.seeds)
        for place, each in further.items():
            cost, before = partial(costs.of, place), found.chosen[place]
            best = found.chosen[place] = min([before, *each.values()], key=cost)
            for name, options in each.items():
                # What would have been better, too, is tried again beside the one that was best.
                if options is best or cost(options) >= cost(before):
                    among = found.tried[place][name]
                    found.tried[place][name] = sorted({*among, dict(options)[name]})


def _possible(
    ablation: Ablation, place: tuple[str, str], chosen: Chosen, name: str, values: Sequence[float]
) -> Chosen | None:
    """Options with the first of some values that the strategy takes; None where it takes none."""
    from fedcmp.pipeline.errors import UserError

    for value in values:
        options = tuple((each, value if each == name else old) for each, old in chosen)
        try:
            trial(ablation, *place, ablation.seeds[0], options)
        except UserError:
            continue
        return options
    return None


def _cost(ablation: Ablation, tried: Trial, failures: Mapping[Path, str]) -> float:
    """What tuning minimises; whatever diverged is worst."""
    assert ablation.tuning is not None
    if tried.experiment.run_path in failures:
        return float("inf")
    return ablation.tuning_sign * tried.score(*ablation.parts(ablation.tuning.measure))


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
