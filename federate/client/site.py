"""The silos of one machine with the frozen LLM, loaded once and ready to train in any round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from fedcmp.federate.client.memo import Memo
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.client.texts import check_texts
from fedcmp.federate.client.trainer import Trainer
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.outgoing.steps import outgoing
from fedcmp.federate.privacy.guard import Guard
from fedcmp.federate.privacy.units import UnitStream, unit_of
from fedcmp.federate.schedule import Schedule
from fedcmp.federate.secure.contribution import Own
from fedcmp.federate.secure.ledger import RELEASES, Ledger
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import FORMAT, federate_options, language_identity, language_options
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import device_type, pick_device
from fedcmp.pipeline.models.language import load_language
from fedcmp.pipeline.models.vision_language import VisionLanguage

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
    ) -> None:
        options = experiment.federate
        device = pick_device(experiment.device)
        language = load_language(experiment.language.path, **language_options(experiment))
        language.checkpointing, language.compiled = options.checkpointing, options.compile
        first = next(iter(caches.values()))
        scratch = projectors.build(options.projector, d_vision=first.d_vision, d_llm=language.d_llm)
        turns, poison = schedule.turns(), options.poison or {}
        visual_tokens = scratch.tokens(first.patches)
        without = check_texts(experiment, caches, language, visual_tokens)
        self.d_llm = language.d_llm
        self.adapter = {name: tuple(matrix.shape) for name, matrix in language.adapter.items()}
        unit = unit_of(options.clipped)
        stream = Stream if unit is None else partial(UnitStream, unit=unit)
        self.streams = {
            client: stream(
                {silo: caches[silo] for silo in silos},
                language,
                template=experiment.language.template,
                max_length=language.at_most(experiment.language.max_length),
                batch_size=options.batch_size,
                turns=turns[client],
                passes=options.passes,
                seed=experiment.seed,
                visual_tokens=visual_tokens,
                without=without,
                mismatched=client in poison and poison[client].kind == "captions",
            )
            for client, silos in schedule.groups.items()
            if caches.keys() >= set(silos)
        }
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
        self._trainer = Trainer(
            self.streams,
            VisionLanguage(scratch.to(device), language),
            options.optimizer,
            batch_size=options.batch_size,
            together=options.together,
            micro_batch=options.micro_batch or options.batch_size,
            memo=_memo(experiment, device),
            advance=advance,
            noisy=self._guard.steps,
            adapter_rate=None if options.adapter is None else options.adapter.learning_rate,
        )

    def __call__(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train the clients of a round; in secure runs their projectors stay here."""
        jobs = self._guard.admitted(jobs, self.streams)
        results = self._trainer(jobs)
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
    shared = [
        "batch_size",
        "micro_batch",
        "projector",
        "optimizer",
        *(["adapter"] if "adapter" in options else []),
    ]
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
