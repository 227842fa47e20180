"""What of a client's projector never leaves it, kept where it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.outgoing.kept import Kept
from fedcmp.pipeline.run_folder import LOCAL


class Personal:
    """Completes what the server sends, and keeps back what it must not get.

    Args:
        run: The run's folder.
        names: Beginnings of the names of what stays here.
        begun: A whole state from a shared one, for clients that begin.
    """

    def __init__(self, run: Path, names: tuple[str, ...], begun: Callable[[State], State]) -> None:
        self._kept, self._names, self._begun = Kept(run / LOCAL), names, begun

    def whole(self, job: Job) -> Job:
        """The job from the client's whole state, as of its last answer that counted."""
        own = self._kept.after(job.client, job.counted)
        return replace(job, start=job.start | own if own else self._begun(job.start))

    def shared(self, job: Job, result: LocalResult) -> LocalResult:
        """The result without what stays here, which is kept."""
        own = {name: each for name, each in result.state.items() if name.startswith(self._names)}
        self._kept.keep(job.client, job.round, own, job.counted)
        shared = {name: each for name, each in result.state.items() if name not in own}
        return replace(result, state=shared)
