"""Several processes at work on the same thing: which parts are whose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedcmp.pipeline.errors import UserError

_SLURM = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Worker:
    """Number `index` of `count`, from 0."""

    index: int
    count: int

    def owns(self, shard: int) -> bool:
        """Whether a shard is this worker's."""
        return shard % self.count == self.index


def parse(text: str, environment: Mapping[str, str]) -> Worker:
    """Read `--worker`.

    Args:
        text: `i/n`, or `auto` for what Slurm or torchrun says.
        environment: `os.environ`, for `auto`.

    Raises:
        UserError: It is neither, or nothing of the kind is in the environment.
    """
    if text == "auto":
        return _from_environment(environment)
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not match:
        raise UserError(f"--worker {text}: expected i/n such as 0/4, or auto")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        raise UserError(f"--worker {text}: workers are numbered from 0 to {max(count - 1, 0)} of {count}")
    return Worker(index, count)


def _from_environment(environment: Mapping[str, str]) -> Worker:
    def number(name: str, default: int) -> int:
        try:
            return int(environment.get(name, default))
        except ValueError:
            raise UserError(f"--worker auto: {name}={environment[name]} is not a number") from None

    slurm = f"{_SLURM}ID" in environment and f"{_SLURM}COUNT" in environment
    ranks = _ranks(environment, slurm)
    if not slurm and ranks is None:
        raise UserError(
            f"--worker auto: none of {_SLURM}ID and {_SLURM}COUNT, SLURM_PROCID and SLURM_NTASKS, RANK and "
            "WORLD_SIZE are set; start it as a Slurm array, with srun or with torchrun, or pass i/n"
        )
    task, tasks = 0, 1
    if slurm:
        tasks = number(f"{_SLURM}COUNT", 1)
        first, step = number(f"{_SLURM}MIN", 0), number(f"{_SLURM}STEP", 1)
        task, rest = divmod(number(f"{_SLURM}ID", 0) - first, max(step, 1))
        if rest or not 0 <= task < tasks:
            raise UserError(
                f"--worker auto: task {environment[f'{_SLURM}ID']} of {tasks} from {first} has no place in "
                "an even row; use --array=0-N"
            )
    rank, world = (0, 1) if ranks is None else (number(ranks[0], 0), number(ranks[1], 1))
    if ranks is not None and not 0 <= rank < world:
        raise UserError(f"--worker auto: {ranks[0]}={rank} is not below {ranks[1]}={world}")
    # Several processes in each task of an array: every pair is a worker of its own.
    return Worker(task * world + rank, tasks * world)


def _ranks(environment: Mapping[str, str], array: bool) -> tuple[str, str] | None:
    """The variables that number processes within a task, None where there are none."""
    # A batch script has SLURM_PROCID and SLURM_NTASKS, too: in an array only a step of srun counts.
    total = "SLURM_STEP_NUM_TASKS" if array else "SLURM_NTASKS"
    pairs = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("SLURM_PROCID", total))
    return next((pair for pair in pairs if environment.keys() >= set(pair)), None)
