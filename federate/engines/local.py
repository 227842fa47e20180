"""The local engine: all clients in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from fedcmp.federate.client.texts import Counts
from fedcmp.federate.engines.base import Engine, SiloCard
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.schedule import Schedule
from fedcmp.pipeline.cache import open_cache, same_key
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress
from fedcmp.pipeline.models.device import peak, pick_device
from fedcmp.pipeline.ranks import Ranks

if TYPE_CHECKING:
    from fedcmp.federate.client.site import Site
    from fedcmp.federate.server.rounds import Train


class LocalEngine(Engine):
    """All clients train in this process, one after the other, with one frozen LLM between them.

    Args:
        experiment: The experiment.
        schedule: Who takes part when.
        ranks: Other processes that train with this one.
    """

    def __init__(self, experiment: Experiment, schedule: Schedule, ranks: Ranks | None = None) -> None:
        self._experiment, self._schedule, self._ranks = experiment, schedule, ranks
        self._caches = {name: open_cache(experiment, name) for name in experiment.federate.silos}
        self._site: Site | None = None

    def cards(self) -> dict[str, SiloCard]:
        """Cards of the caches on this machine."""
        same_key(self._caches)
        return {name: SiloCard.of(cache, self._experiment) for name, cache in self._caches.items()}

    @contextmanager
    def training(self, start: int) -> Iterator[Train]:
        """Load the LLM and show progress in steps."""
        from fedcmp.federate.client.site import Site

        site = self._site = Site(
            self._experiment,
            self._schedule,
            self._caches,
            lambda steps: advance(steps),
            ranks=self._ranks,
        )
        done, turns = self._schedule.turns(start), self._schedule.turns()
        steps = sum(
            stream.steps(turn)
            for client, stream in site.streams.items()
            for turn in range(done[client], turns[client])
        )
        with progress(self._experiment.run, steps, "steps") as task:
            advance = task.advance

            def train(jobs: Sequence[Job]) -> Iterator[LocalResult]:
                losses, together = [], self._experiment.federate.together
                flops = seconds = 0.0
                for first in range(0, len(jobs), together):
                    for result in site(jobs[first : first + together]):
                        losses += [] if result.loss is None else [result.loss]
                        if not result.recalled:
                            flops, seconds = flops + (result.flops or 0), seconds + (result.seconds or 0)
                        yield result
                if losses:
                    speed = self._speed(flops, seconds)
                    task.note(f"round {jobs[0].round + 1}: loss {fmean(losses):.3f}{speed}")

            yield train

    def _speed(self, flops: float, seconds: float) -> str:
        """FLOP/s on GPUs, and the part of their peak that is (MFU), where it is known."""
        device = pick_device(self._experiment.device)
        if device == "cpu" or not seconds:
            return ""
        import torch

        most = peak(torch.cuda.get_device_name(device))
        whole = 1 if self._ranks is None else self._ranks.count
        of = "" if most is None else f" ({flops / seconds / most / whole:.0%} of the peak)"
        return f", {flops / seconds / 1e12:.1f} TFLOP/s{of}"

    def counts(self) -> dict[str, Counts]:
        """What was found when the LLM was loaded."""
        assert self._site is not None
        return self._site.counts

    def exchange(
        self, requests: Mapping[str, dict[str, Any]], kind: Literal["secure", "align"] = "secure"
    ) -> dict[str, dict[str, Any]]:
        """Every client answers, in secure rounds."""
        assert self._site is not None
        assert kind == "secure"
        return {client: self._site.secure(client, request) for client, request in requests.items()}

    @property
    def d_llm(self) -> int:
        """Width of the LLM's embeddings."""
        assert self._site is not None
        return self._site.d_llm

    @property
    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's matrices by name."""
        assert self._site is not None
        return self._site.adapter
