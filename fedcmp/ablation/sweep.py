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

from fedcmp.ablation.edges import Tried, at_edges, beyond, edges, numbers
from fedcmp.ablation.file import Ablation, Chosen, Trial, component, grid, plugins_of, trial

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class _Done:
    """What came of a trial: why it diverged, if it did, and the CPU seconds that it took."""

    failure: str
    seconds: float


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


def sweep(ablations: Sequence[Ablation], jobs: int | None = None) -> Iterator[Finished]:
    """Do all runs of ablations that are not done yet, one ablation after the other.

    Args:
        ablations: What to compare.
        jobs: Runs at a time; all cores by default, 1 with a GPU.

    Raises:
        UserError: An option or measure of any of them is wrong, before anything is computed; a best value
            lies at the edge of its grid; a process was killed.
    """
    for ablation in ablations:
        _check(ablation)
    with _pool(jobs) as pool:
        for ablation in ablations:
            log = Path("build/ablations") / f"{ablation.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            tuned = _tuned(pool, ablation, log)
            _require_tuned(ablation, tuned)
            trials = list(_trials(ablation, tuned.chosen))
            failures = _run_all(pool, ablation, trials, log, _benchmarks(ablation.measures))
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
                benchmarks_of(experiment, _benchmarks(measures))


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


def _tuned(pool: ProcessPoolExecutor, ablation: Ablation, log: Path) -> _Tuned:
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
            place: sorted(choices, key=costs.of[place].__getitem__)[: -(-len(choices) // 4)]
            for place, choices in left.items()
        }
    chosen = {place: min(choices, key=costs.of[place].__getitem__) for place, choices in left.items()}
    found = _Tuned(chosen, tried, costs.failures)
    if ablation.tuning.edges == "extend":
        _extend(ablation, found, costs)
    return found


class _Costs:
    """What tuning minimises: sums over seeds, by (scenario, strategy) and options."""

    def __init__(self, pool: ProcessPoolExecutor, ablation: Ablation, log: Path) -> None:
        self._pool, self._ablation, self._log = pool, ablation, log
        self.of: dict[tuple[str, str], dict[Chosen, float]] = defaultdict(lambda: defaultdict(float))
        self.failures: dict[Path, str] = {}

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
        measured = _benchmarks([ablation.tuning.measure])
        self.failures |= _run_all(self._pool, ablation, trials, self._log, measured)
        for each in trials:
            self.of[each.scenario, each.strategy][each.options] += _cost(ablation, each, self.failures)


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
            cost, before = costs.of[place].__getitem__, found.chosen[place]
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
    return ablation.sign * tried.score(ablation.tuning.measure)


def _benchmarks(measures: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(measure.split(": ", 1)[0] for measure in measures))


def _run_all(
    pool: ProcessPoolExecutor, ablation: Ablation, trials: list[Trial], log: Path, benchmarks: tuple[str, ...]
) -> dict[Path, str]:
    """Extract, train and score; returns why runs diverged, if any did."""
    caches = list({trial.experiment.features: trial for trial in trials}.values())
    _each(pool, _extract, caches, benchmarks, log, f"{ablation.name}: caches")
    return _each(pool, _run, trials, benchmarks, log, f"{ablation.name}: runs")


def _each(
    pool: ProcessPoolExecutor,
    work: Work,
    trials: list[Trial],
    benchmarks: tuple[str, ...],
    log: Path,
    title: str,
) -> dict[Path, str]:
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool

    from fedcmp.pipeline.console import progress, say
    from fedcmp.pipeline.errors import UserError

    failures = {}
    seconds = 0.0
    with progress(title, len(trials), "runs") as task:
        futures = {pool.submit(work, trial, benchmarks, log): trial for trial in trials}
        try:
            for future in as_completed(futures):
                done, run = future.result(), futures[future].experiment.run_path
                seconds += done.seconds
                if done.failure:
                    failures[run] = done.failure
                    say(f"{run}: {done.failure}")
                task.advance()
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a process was killed, perhaps for lack of memory; run the same command with "
                "fewer --jobs to go on"
            ) from None
    if trials:
        say(f"{title}: {seconds:,.0f} CPU s, {seconds / len(trials):.1f} each")
    return failures


@contextmanager
def _pool(jobs: int | None) -> Iterator[ProcessPoolExecutor]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import active_children, get_context

    from fedcmp.pipeline.models.device import pick_device

    size = jobs or (1 if pick_device("auto") != "cpu" else os.cpu_count() or 1)
    # Also LAPACK's threads, which are counted when it is loaded.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ |= dict.fromkeys(_THREADS, "1")
    pool = ProcessPoolExecutor(size, get_context("spawn"), _begin_worker)
    try:
        yield pool
    except BaseException:
        # What is under way may take hours; it is resumed from its last round.
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _begin_worker() -> None:
    """One thread a run: two runs on two cores are faster than one run on both."""
    import signal
    import threading

    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A parent that was killed must not leave runs behind that hold their locks."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _extract(trial: Trial, benchmarks: tuple[str, ...], log: Path) -> _Done:
    from fedcmp.extract.run import run

    began = time.process_time()
    with _logged(log):
        run(trial.experiment, only=(), overwrite=False)
    return _Done("", time.process_time() - began)


def _run(trial: Trial, benchmarks: tuple[str, ...], log: Path) -> _Done:
    from fedcmp.evaluate.run import evaluate_run
    from fedcmp.federate.run import run
    from fedcmp.pipeline.errors import DivergedError

    began, failure = time.process_time(), ""
    with _logged(log):
        try:
            run(trial.experiment)
            evaluate_run(trial.experiment, benchmarks)
        except DivergedError as error:
            failure = str(error)
    return _Done(failure, time.process_time() - began)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what the stages print to a file."""
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield
