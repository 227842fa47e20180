"""The silos of one machine with the frozen LLM, loaded once and ready to train in any round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from fedcmp.federate.client.clients import Clients
from fedcmp.federate.client.memo import Memo
from fedcmp.federate.client.personal import Personal
from fedcmp.federate.client.texts import check_texts
from fedcmp.federate.compatible import refuse_over_ranks
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.outgoing.steps import outgoing
from fedcmp.federate.privacy.guard import Guard
from fedcmp.federate.ranks.follow import led
from fedcmp.federate.schedule import Schedule
from fedcmp.federate.secure.contribution import Own
from fedcmp.federate.secure.ledger import RELEASES, Ledger
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import FORMAT, federate_options, language_identity
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.ranks import Ranks

if TYPE_CHECKING:
    from fedcmp.federate.secure.party import Party
    from fedcmp.federate.secure.signing import Signing


class Site:
    """Trains clients whose silos are on this machine.

    Args:
        experiment: The experiment.
        schedule: Who takes part when.
        caches: Feature caches by silo; the clients are those whose silos are all here.
        advance: Called with the number of local steps done.
        signing: How the clients of secure sums know each other.
        ranks: Other processes that train with this one.

    Raises:
        UserError: The LLM cannot be loaded, or a silo has too few texts.
    """

    def __init__(
        self,
        experiment: Experiment,
        schedule: Schedule,
        caches: Mapping[str, FeatureCache],
        advance: Callable[[int], None] = lambda steps: None,
        signing: Signing | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        options, share = experiment.federate, None
        if ranks is None:
            refuse_over_ranks(experiment, 1)
            clients = Clients(experiment, schedule, caches, partial(check_texts, experiment, caches))
        else:
            clients, share = led(experiment, schedule, caches, ranks)
        self.d_llm, self.adapter, self.streams = clients.d_llm, clients.adapter, clients.streams
        self.counts = {
            silo: counts for stream in self.streams.values() for silo, counts in stream.counts.items()
        }
        self._secure, self._guard = options.secure, Guard(experiment, schedule, caches)
        self._outgoing = outgoing(experiment, self._guard)
        self._own: dict[str, Own] = {}
        self._round: dict[str, int] = {}
        agreed = {"federate": options.as_identity("initial"), "seed": experiment.seed}
        # Where no component is of a plugin, as before there were any.
        if any(plugged := [options.projector.provenance, options.strategy.provenance]):
            agreed["plugins"] = plugged
        noisy = options.clipped is not None and options.clipped.noise_multiplier > 0
        self._ledger = {
            client: Ledger(experiment.run_path / RELEASES, agreed, client, noisy) for client in self.streams
        }
        self._signing = signing
        self._parties: dict[str, Party] = {}
        self._personal = None
        if local := clients.strategy.local:
            self._personal = Personal(experiment.run_path, local, clients.projector.completed)
        self._trainer = clients.trainer(
            memo=_memo(experiment, clients.device), advance=advance, noisy=self._guard.steps, share=share
        )

    def __call__(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train the clients of a round; in secure runs their projectors stay here."""
        jobs = self._guard.admitted(jobs, self.streams)
        if self._personal is None:
            results = self._trainer(jobs)
        else:
            results = self._trainer([self._personal.whole(job) for job in jobs])
            results = [self._personal.shared(*pair) for pair in zip(jobs, results, strict=True)]
        for step in self._outgoing:
            results = [step(*pair) for pair in zip(jobs, results, strict=True)]
        if not self._secure:
            return results
        for job, result in zip(jobs, results, strict=True):
            self._ledger[job.client].begin(job.round, job.start)
            self._own[job.client] = Own(job.client, job.start, result.state)
            self._round[job.client] = job.round
        return [
            replace(result, state={}, gradient=None, alignment=None, optimizer=None) for result in results
        ]

    def secure(self, client: str, request: dict[str, Any]) -> dict[str, Any]:
        """Take a step of a secure round for a client.

        Raises:
            ValueError: It has not trained since this process began, or refuses the step.
        """
        if not self._secure or client not in self._own:
            raise ValueError(f"client '{client}' has no update to add to a secure sum")
        own, ledger, round_ = self._own[client], self._ledger[client], self._round[client]
        if request["step"] == "norm":
            return {"norm": own.norm()}
        if request["step"] == "agree":
            ledger.tell(round_, _question(request))
            return dict(own.agreements(request["totals"], request["share"]))
        # Only here, as it needs the extra [privacy].
        from fedcmp.federate.secure.party import Party

        if request["step"] == "advertise":

            def release(asked: dict[str, Any], survivors: list[str]) -> None:
                own.permit(asked, survivors)
                ledger.release(round_, fingerprint([asked, survivors]), survivors)

            self._parties[client] = Party(client, own.contribute, release, self._signing)
        if client not in self._parties:
            raise ValueError(f"client '{client}' is in no secure sum")
        return self._parties[client].step(request)


def _question(request: Mapping[str, Any]) -> str:
    digest = sha256(repr(request["share"]).encode())
    for name in sorted(request["totals"]):
        digest.update(name.encode() + request["totals"][name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _memo(experiment: Experiment, device: str) -> Memo | None:
    """Local updates shared by runs with the same LLM, data handling and arithmetic; none that are private."""
    if experiment.memo is None or experiment.federate.clipped is not None:
        return None
    options = federate_options(experiment)
    shared = ["batch_size", "micro_batch", "projector", "optimizer"]
    shared += [name for name in ("all_reduce", "shard", "adapter", "micro_tokens") if name in options]
    texts = {"template": experiment.language.template, "max_length": experiment.language.max_length}
    context = {
        "options": {name: options[name] for name in shared},
        "language": language_identity(experiment) | texts,
        "compile": experiment.federate.compile,
        "device": device_type(device),
        "threads": torch.get_num_threads(),
        "format": FORMAT,
        "made_by": provenance(device)["packages"],
    }
    return Memo(experiment.memo.path, experiment.memo.limit, context)
