"""All clients of this process train here and share one frozen LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from fedcmp.federate.client.alignment import alignment_contributions
from fedcmp.federate.client.memo import Memo, job_key
from fedcmp.federate.client.share import Share, Whole
from fedcmp.federate.client.step import train_together
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.steps import NoisySteps
from fedcmp.federate.strategies.base import Role
from fedcmp.pipeline.config import Optimizer
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import one_line
from fedcmp.pipeline.models.device import in_one_order
from fedcmp.pipeline.models.vision_language import VisionLanguage

_ALIGNMENT_SAMPLES = 256


@dataclass(frozen=True)
class Trainer:
    """Does the clients' local training of a round.

    Attributes:
        streams: Every client's data.
        model: The frozen LLM behind a projector of the right architecture, on its device.
        options: Local optimisation.
        batch_size: Samples a client's step.
        together: Clients whose samples go through the LLM together.
        micro_batch: Samples a forward pass of the LLM has at most.
        micro_tokens: Tokens that it has at most.
        memo: Local updates that were computed before.
        advance: Called with the number of steps done.
        noisy: How local steps keep samples private, if they do.
        adapter_rate: Learning rate of the adapter, if it has one of its own.
        share: Which micro-batches are computed here.
        role: What a client does in a round, where not all do the same.
    """

    streams: Mapping[str, Stream]
    model: VisionLanguage
    options: Optimizer
    batch_size: int
    together: int
    micro_batch: int
    memo: Memo | None
    advance: Callable[[int], None]
    micro_tokens: int | None = None
    noisy: NoisySteps | None = None
    adapter_rate: float | None = None
    share: Share = field(default_factory=Whole)
    role: Callable[[str, int], Role | None] = lambda client, round_: None

    def __call__(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train the clients of a round."""
        results: list[LocalResult] = []
        for start in range(0, len(jobs), self.together):
            group = jobs[start : start + self.together]
            results += [self._aligned(*pair) for pair in zip(group, self._recalled(group), strict=True)]
        return results

    def _recalled(self, jobs: Sequence[Job]) -> list[LocalResult]:
        if self.memo is None or any(job.optimizer is not None for job in jobs):
            return self.share.trained(jobs, self.train)
        keys = [self._key(job) for job in jobs]
        known = self.memo.recall(keys)
        if known is None:
            with self.memo.claimed(keys):
                known = self.memo.recall(keys)
                if known is None:
                    trained = self.share.trained(jobs, self.train)
                    self.memo.keep(keys, trained)
                    return trained
        self.advance(sum(result.steps for result in known))
        return [
            replace(result, client=job.client, recalled=True) for job, result in zip(jobs, known, strict=True)
        ]

    def _key(self, job: Job) -> dict[str, Any]:
        role = self.role(job.client, job.round)
        does = {} if role is None else {"role": asdict(role)}
        return job_key(job) | {"data": self.streams[job.client].content(job.turn)} | does

    def train(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train clients, or compute a share of it."""
        try:
            # What one of several processes cannot do, it cannot try again alone.
            with in_one_order(str(self.model.language.device), strict=self.share.alone):
                return self._train(jobs)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            say(f"equal runs may end in different bytes here: {one_line(error)}")
        return self._train(jobs)

    def _train(self, jobs: Sequence[Job]) -> list[LocalResult]:
        streams = [self.streams[job.client] for job in jobs]
        return train_together(
            jobs,
            [
                (stream.steps(job.turn), stream.batches(job.turn))
                for job, stream in zip(jobs, streams, strict=True)
            ],
            self.model,
            self.options,
            micro_batch=self.micro_batch,
            micro_tokens=self.micro_tokens,
            advance=self.advance,
            noisy=self.noisy,
            adapter_rate=self.adapter_rate,
            share=self.share,
            role=lambda job: self.role(job.client, job.round),
        )

    def _aligned(self, job: Job, result: LocalResult) -> LocalResult:
        """The result with its alignment, measured on the first samples of the client's turn."""
        if "alignment" not in job.wants:
            return result
        batches = self.streams[job.client].batches(job.turn)
        some = islice(batches, -(-_ALIGNMENT_SAMPLES // self.batch_size))
        contributions = alignment_contributions(self.model, job.start, result.state, some, job.measure)
        return replace(result, alignment=contributions)
