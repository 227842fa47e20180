"""What happens to a client's result before it leaves: a list of steps, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.outgoing.compression import compressed, restored
from fedcmp.federate.outgoing.kept import Kept
from fedcmp.federate.outgoing.poison import poisoned
from fedcmp.federate.privacy.guard import Guard
from fedcmp.pipeline.config import Communication, Experiment, Poison
from fedcmp.pipeline.run_folder import RESIDUALS

Step = Callable[[Job, LocalResult], LocalResult]


def outgoing(experiment: Experiment, guard: Guard) -> list[Step]:
    """The steps that an experiment asks for."""
    options, steps = experiment.federate, list[Step]()
    if options.poison:
        steps.append(partial(_poison, options.poison, experiment.seed))
    if options.clipped is not None:
        steps.append(guard.released)
    if options.communication is not None:
        residuals = Kept(experiment.run_path / RESIDUALS)
        steps.append(partial(_compress, options.communication, residuals, experiment.seed))
    return steps


def _poison(poison: dict[str, Poison], seed: int, job: Job, result: LocalResult) -> LocalResult:
    if job.client not in poison:
        return result
    state = poisoned(job.start, result.state, poison[job.client], seed, job.client, job.round)
    return replace(result, state=state)


def _compress(
    options: Communication, residuals: Kept, seed: int, job: Job, result: LocalResult
) -> LocalResult:
    left = residuals.after(job.client, job.counted)
    update = {name: result.state[name] - old for name, old in job.start.items()}
    update = {name: x + left[name] if left else x for name, x in update.items()}
    sent = compressed(update, options, f"{seed}/{job.client}/{job.round}")
    there = restored(sent)
    left = {name: x - there[name] for name, x in update.items()}
    residuals.keep(job.client, job.round, left, job.counted)
    return replace(result, state={}, sent=sent)
