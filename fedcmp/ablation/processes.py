"""The processes that do an ablation's runs: how many, on which cores and GPUs, and beside whom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcmp.extract.workers import Worker

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import SimpleQueue

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# A run is one process's, whatever started the workers.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Crew:
    """This worker's processes.

    Attributes:
        pool: Takes runs.
        worker: Which worker of how many this is.
    """

    pool: ProcessPoolExecutor
    worker: Worker

    def submit(self, *work: Any) -> Future[Any]:
        """Have one process do something."""
        return self.pool.submit(*work)


def machine(worker: Worker, auto: bool, environment: Mapping[str, str]) -> Worker:
    """This worker among those that share its machine.

    Args:
        worker: This one among all.
        auto: Whether a launcher started it, which then says who shares its machine. Slurm gives every task
            cores and GPUs of its own; numbered by hand, all are taken to be on one machine.
        environment: `os.environ`.
    """
    if not auto:
        return worker
    local, number = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE", "")
    together = local.isdecimal() and number.isdecimal() and int(local) < int(number)
    return Worker(int(local), int(number)) if together else Worker(0, 1)


def share(things: Sequence[str], here: Worker) -> list[str]:
    """A worker's part of its machine's GPUs; where there are fewer than workers, one that others use, too."""
    own = list(things[here.index :: here.count])
    return own or [things[here.index % len(things)]] if things else []


def gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` has them; CUDA is not started."""
    from fedcmp.pipeline.models.device import pick_device

    if pick_device("auto") == "cpu":
        return []
    if environment.get(_VISIBLE):
        return environment[_VISIBLE].split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@contextmanager
def crew(jobs: int | None, worker: Worker, here: Worker) -> Iterator[Crew]:
    """Processes for runs, each with one thread and, where there are GPUs, one of them.

    Args:
        jobs: How many; by default one for each of this worker's GPUs or, without any, cores.
        worker: This worker.
        here: This worker among those of its machine.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import active_children, get_context

    own = share(gpus(os.environ), here)
    size = jobs or len(own) or max(cores() // here.count, 1)
    context = get_context("spawn")
    devices = context.SimpleQueue()
    for number in range(size):
        devices.put(own[number % len(own)] if own else None)
    # Also LAPACK's threads, which are counted when it is loaded.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ |= dict.fromkeys(_THREADS, "1")
    pool = ProcessPoolExecutor(size, context, _begin, (devices,))
    try:
        yield Crew(pool, worker)
    except BaseException:
        # What is under way may take hours; it is resumed from its last round.
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _begin(devices: SimpleQueue[str | None]) -> None:
    """One thread a run: two runs on two cores are faster than one run on both."""
    import signal
    import threading

    device = devices.get()
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    if device is not None:
        os.environ[_VISIBLE] = device
    # Only now: CUDA counts its devices once.
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A parent that was killed must not leave runs behind that hold their locks."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
