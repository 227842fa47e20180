"""The border of a site whose clients are private: what may be asked, what is counted, and what may leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

from fedcmp.federate.client.stream import Stream
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.accounting import resolved
from fedcmp.federate.privacy.ledger import Ledger, Release
from fedcmp.federate.privacy.noise import privatised
from fedcmp.federate.privacy.steps import NoisySteps
from fedcmp.federate.schedule import Schedule
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint


class Guard:
    """Stands between the clients of a machine and whoever they answer.

    Args:
        experiment: The experiment.
        schedule: Who takes part when.
        caches: Feature caches by silo.

    Raises:
        UserError: A cache's features are not each picture's own, or there is a budget and no noise.
    """

    def __init__(
        self, experiment: Experiment, schedule: Schedule, caches: Mapping[str, FeatureCache]
    ) -> None:
        options = experiment.federate.clipped
        turns, passes = max(schedule.turns().values(), default=0), experiment.federate.passes
        self._options = None if options is None else resolved(options, turns, passes)
        self._schedule, self._caches, self._ledger = schedule, caches, Ledger(experiment.ledger)
        self._batch_size = experiment.federate.batch_size
        self._run = fingerprint(
            [
                experiment.experiment,
                experiment.run,
                experiment.seed,
                experiment.federate.as_identity("initial"),
            ]
        )
        self._partitions: dict[tuple[str, int], str] = {}
        self._releases: dict[str, int] = {}
        if experiment.ledger.epsilon is not None and (options is None or not options.noisy):
            raise UserError(
                f"ledger.epsilon = {experiment.ledger.epsilon:g}: this machine has a budget, and the run is "
                "not private; add federate.privacy.clip and epsilon, or remove the budget"
            )
        for cache in caches.values():
            if self._by_record and cache.quantiser is not None:
                raise UserError(
                    f"{cache.path}: int8 features are in steps that all pictures have set together, so no "
                    "picture is private; extract it with extract.dtype = 'bfloat16'"
                )

    @property
    def _by_record(self) -> bool:
        return self._options is not None and self._options.unit != "client"

    @property
    def steps(self) -> NoisySteps | None:
        """How local steps keep units private, if they do."""
        if self._options is None or not self._by_record:
            return None
        assert self._options.clip is not None
        return NoisySteps(self._options.clip, self._options.noise_multiplier, self._batch_size)

    def admitted(self, jobs: Sequence[Job], streams: Mapping[str, Stream]) -> list[Job]:
        """Jobs as they may be done; those of noised answers are written down.

        Raises:
            UserError: An answer would exceed the budget of a silo.
        """
        if self._options is None:
            return list(jobs)
        for job in jobs:
            self._check(job)
        if self._options.noisy:
            for job in jobs:
                silos = {silo: self._caches[silo].content for silo in self._schedule.groups[job.client]}
                self._releases[job.client] = self._ledger.enter(
                    silos, *self._entries(job, streams[job.client])
                )
        allowed = frozenset({"gradient"}) if self._by_record else frozenset()
        return [replace(job, wants=job.wants & allowed) for job in jobs]

    def _check(self, job: Job) -> None:
        """What is counted is what the schedule says, not what the job does."""
        number = job.round
        if type(number) is not int or not 0 <= number < len(self._schedule.rounds):
            raise UserError(f"client '{job.client}' refuses round {number}, which is none of the run's")
        turn = self._schedule.turns(number)[job.client]
        if job.client not in self._schedule.rounds[number] or job.turn != turn:
            raise UserError(
                f"client '{job.client}' refuses turn {job.turn} in round {number}; its schedule has {turn}"
            )

    def _entries(self, job: Job, stream: Stream) -> list[Release]:
        """What an answer is: one release, or one for every pass that its turn is of."""
        options = self._options
        assert options is not None
        if options.unit == "client":
            noise = options.noise_multiplier * sqrt(self._surely(job) / len(self._schedule.rounds[job.round]))
            return [Release(self._run, job.round, options.unit, "", 0, noise)]
        partitions = [self._partition(job.client, number, stream) for number in stream.parts(job.turn)]
        noise = options.noise_multiplier
        return [
            Release(self._run, job.round, options.protected, each, job.turn, noise) for each in partitions
        ]

    def _partition(self, client: str, number: int, stream: Stream) -> str:
        """How a pass divides the units into turns."""
        if (client, number) not in self._partitions:
            turns = range(self._schedule.turns()[client])
            contents: list[Any] = [stream.content(turn, number) for turn in turns]
            # Passes of one turn over few units may be alike, and count all the same.
            self._partitions[client, number] = fingerprint(contents + [number] * (number > 0))
        return self._partitions[client, number]

    def _surely(self, job: Job) -> int:
        """Clients whose noise is on whatever the server sees of a client, whoever drops out."""
        from fedcmp.federate.secure.summation import threshold_of

        assert self._options is not None
        clients = len(self._schedule.rounds[job.round])
        return threshold_of(clients, self._options.threshold) if self._options.secure else 1

    def released(self, job: Job, result: LocalResult) -> LocalResult:
        """A private client's result as it may leave.

        A projector that private steps have made is free to go, and so is all that was computed from their
        gradients alone. How many units and steps there are is public.
        """
        options = self._options
        assert options is not None
        cleared = LocalResult(
            client=result.client,
            state=result.state,
            loss=None,
            samples=result.samples,
            steps=result.steps,
            tokens=None,
            seconds=None,
            releases=self._releases.get(job.client, 1),
        )
        if self._by_record:
            return replace(cleared, optimizer=result.optimizer, gradient=result.gradient)
        clients = len(self._schedule.rounds[job.round])
        return replace(cleared, state=privatised(job.start, result.state, options, clients))
