"""From a round's answers to the next projector: what is counted, restored and fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedcmp.federate.arithmetic.updates import State, Update, check
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.outgoing import compression as communication
from fedcmp.federate.server.arrivals import Arrivals
from fedcmp.federate.server.progress import Progress
from fedcmp.federate.strategies.base import Aggregate, Strategy, require_form
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import ComponentError, DivergedError, DroppedOutError, SpoiledError
from fedcmp.pipeline.plugins import blamed

if TYPE_CHECKING:
    from fedcmp.federate.secure.summation import Exchange


_REMEDY = "lower federate.optimizer.learning_rate or the strategy's step"


@dataclass(frozen=True)
class Secure:
    """How clients that keep their updates are reached.

    Attributes:
        exchange: Takes a step of the protocol with some clients.
        threshold: Share of a round's clients of which more have to stay until its end.
    """

    exchange: Exchange
    threshold: float


def _restored(start: State, result: LocalResult) -> LocalResult:
    """The result with the projector that a compressed update stands for."""
    if result.sent is None:
        return result
    return replace(result, state=communication.received(start, result.sent, result.client), sent=None)


def usable(
    jobs: Sequence[Job], results: Iterable[LocalResult], quorum: int | None, arrivals: Arrivals
) -> list[LocalResult]:
    """Results whose updates are sound, with the projectors that compressed ones stand for, in order of jobs.

    Each is checked and put into files before the next is asked for.
    """
    start = {job.client: job.start for job in jobs}
    sound: dict[str, LocalResult] = {}
    reasons: dict[str, str] = {}
    for result in results:
        try:
            whole = _restored(start[result.client], result)
            check(start[result.client], [_update(whole, whole.samples)])
            sound[result.client] = arrivals.kept(whole)
        except ValueError as error:
            reasons[result.client] = str(error)
    told = [reasons[client] for client in start if client in reasons]
    if told and len(sound) < min(quorum or len(jobs), len(jobs)):
        raise DivergedError(f"round {jobs[0].round}: {'; '.join(told)}; {_REMEDY}")
    for reason in told:
        say(f"round {jobs[0].round + 1} goes on without it: {reason}")
    return [sound[client] for client in start if client in sound]


def _update(result: LocalResult, samples: int) -> Update:
    return Update(result.client, result.state, samples, result.steps, result.gradient, result.alignment)


def _fused(
    strategy: Strategy,
    progress: Progress,
    results: Sequence[LocalResult],
    samples: Mapping[str, int],
    secure: Secure | None,
) -> Aggregate:
    if secure is None:
        updates = [_update(result, samples[result.client]) for result in results]
        with blamed(strategy, f"strategy '{type(strategy).__name__}'"):
            aggregate = strategy.aggregate(progress.state, updates, progress.memory)
            require_form(progress.state, aggregate)
        return aggregate
    from fedcmp.federate.secure import masked
    from fedcmp.federate.secure.summation import threshold_of

    threshold = threshold_of(len(samples), secure.threshold, strategy.releases())
    with blamed(strategy, f"strategy '{type(strategy).__name__}'"):
        aggregate = masked.aggregate(
            strategy, secure.exchange, progress.state, samples, threshold, progress.memory
        )
        require_form(progress.state, aggregate)
    return aggregate


def aggregated(
    strategy: Strategy,
    progress: Progress,
    results: Sequence[LocalResult],
    samples: Mapping[str, int],
    secure: Secure | None,
) -> Aggregate:
    """The round's aggregate, which is finite.

    Raises:
        DivergedError: It is not.
        SpoiledError: A secure sum is not what clients added.
        DroppedOutError: Too few clients are left in a secure sum.
    """
    try:
        aggregate = _fused(strategy, progress, results, samples, secure)
    except (DroppedOutError, ComponentError):
        raise
    except SpoiledError as error:
        raise SpoiledError(f"round {progress.round + 1}: {error}") from None
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise DivergedError(f"round {progress.round}: {error}; {_REMEDY}") from None
    for name, tensor in aggregate.state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"round {progress.round}: the aggregated {name} is not finite; {_REMEDY}")
    return aggregate
