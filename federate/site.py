"""The silos of one machine with the frozen LLM, loaded once and ready to train in any round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from federate.batches import Stream
from federate.client import Job, LocalResult
from federate.communication import compressed, restored
from federate.local import LocalEngine
from federate.memo import Memo
from federate.plan import Plan
from federate.poison import poisoned
from federate.privacy.guard import Guard
from federate.privacy.images import ImageStream
from federate.residuals import RESIDUALS, Residuals
from federate.secure.contribution import Own
from pipeline import projector as projectors
from pipeline.cache import FeatureCache
from pipeline.config import Communication, Experiment
from pipeline.device import pick_device
from pipeline.identity import FORMAT, language_identity, language_options
from pipeline.language import load_language
from pipeline.manifest import provenance

if TYPE_CHECKING:
    from federate.secure.party import Party

_SUMS = 2


class Site:
    """Trains clients whose silos are on this machine.

    Args:
        experiment: The experiment.
        plan: Who takes part when.
        caches: Feature caches by silo; the clients are those whose silos are all here.
        advance: Called with the number of local steps done.

    Raises:
        UserError: The LLM cannot be loaded, or a silo has too few texts.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        caches: Mapping[str, FeatureCache],
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        options = experiment.federate
        device = pick_device(experiment.device)
        language = load_language(experiment.language.path, **language_options(experiment))
        language.checkpointing, language.compiled = options.checkpointing, options.compile
        first = next(iter(caches.values()))
        scratch = projectors.build(options.projector, d_vision=first.d_vision, d_llm=language.d_llm)
        turns, poison = plan.turns(), options.poison or {}
        self.d_llm = language.d_llm
        by_image = options.clipped is not None and options.clipped.unit == "image"
        self.streams = {
            client: (ImageStream if by_image else Stream)(
                {silo: caches[silo] for silo in silos},
                language,
                template=experiment.language.template,
                max_length=experiment.language.max_length,
                batch_size=options.batch_size,
                turns=turns[client],
                seed=experiment.seed,
                visual_tokens=scratch.tokens(first.patches),
                mismatched=client in poison and poison[client].kind == "captions",
            )
            for client, silos in plan.groups.items()
            if caches.keys() >= set(silos)
        }
        self._secure, self._guard = options.secure, Guard(experiment, plan, caches)
        self._poison, self._seed = poison, experiment.seed
        self._communication = options.communication
        self._residuals = Residuals(experiment.run_path / RESIDUALS)
        self._own: dict[str, Own] = {}
        self._sums: dict[str, int] = {}
        self._told: dict[str, set[str]] = {}
        self._parties: dict[str, Party] = {}
        self._engine = LocalEngine(
            self.streams,
            scratch.to(device),
            language,
            options.optimizer,
            batch_size=options.batch_size,
            together=options.together,
            micro_batch=options.micro_batch or options.batch_size,
            memo=_memo(experiment, device),
            advance=advance,
            noisy=self._guard.steps,
        )

    def __call__(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train the clients of a round; in secure runs their projectors stay here."""
        jobs = self._guard.admitted(jobs, self.streams)
        results = self._engine(jobs)
        if self._poison:
            results = [self._poisoned(*pair) for pair in zip(jobs, results, strict=True)]
        results = self._guard.released(jobs, results)
        if self._communication is not None:
            pairs = zip(jobs, results, strict=True)
            return [self._compressed(*pair, self._communication) for pair in pairs]
        if not self._secure:
            return results
        for job, result in zip(jobs, results, strict=True):
            self._own[job.client] = Own(job.client, job.start, result.state)
            self._sums[job.client] = 0
            self._told[job.client] = set()
        return [
            replace(result, state={}, gradient=None, alignment=None, optimizer=None) for result in results
        ]

    def _poisoned(self, job: Job, result: LocalResult) -> LocalResult:
        if job.client not in self._poison:
            return result
        options = self._poison[job.client]
        state = poisoned(job.start, result.state, options, self._seed, job.client, job.round)
        return replace(result, state=state)

    def _compressed(self, job: Job, result: LocalResult, options: Communication) -> LocalResult:
        left = self._residuals.after(job.client, job.counted)
        update = {name: result.state[name] - old for name, old in job.start.items()}
        update = {name: x + left[name] if left else x for name, x in update.items()}
        sent = compressed(update, options, f"{self._seed}/{job.client}/{job.round}")
        there = restored(sent)
        left = {name: x - there[name] for name, x in update.items()}
        self._residuals.keep(job.client, job.round, left, job.counted)
        return replace(result, state={}, sent=sent)

    def secure(self, client: str, request: dict[str, Any]) -> dict[str, Any]:
        """Take a step of a secure round for a client.

        Raises:
            ValueError: It has not trained since this process began, or refuses the step.
        """
        if not self._secure or client not in self._own:
            raise ValueError(f"client '{client}' has no update to add to a secure sum")
        own = self._own[client]
        if request["step"] in ("norm", "agree"):
            if request["step"] in self._told[client]:
                raise ValueError(
                    f"client '{client}' refuses: told again and again it would reveal its update"
                )
            self._told[client].add(request["step"])
        if request["step"] == "norm":
            return {"norm": own.norm()}
        if request["step"] == "agree":
            return dict(own.agreements(request["totals"], request["share"]))
        # Only here, as it needs the extra [privacy].
        from federate.secure.party import Party

        if request["step"] == "advertise":
            self._sums[client] += 1
            if self._sums[client] > _SUMS:
                raise ValueError(f"client '{client}' refuses: many sums of one update would reveal it")
            self._parties[client] = Party(client, own.contribute)
        if client not in self._parties:
            raise ValueError(f"client '{client}' is in no secure sum")
        return self._parties[client].step(request)


def _memo(experiment: Experiment, device: str) -> Memo | None:
    """Local updates shared by runs with the same LLM, data handling and arithmetic; none that are private."""
    if experiment.memo is None or experiment.federate.clipped is not None:
        return None
    options = experiment.federate.model_dump(mode="json")
    shared = ("batch_size", "micro_batch", "projector", "optimizer")
    texts = {"template": experiment.language.template, "max_length": experiment.language.max_length}
    context = {
        "options": {name: options[name] for name in shared},
        "language": language_identity(experiment) | texts,
        "compile": experiment.federate.compile,
        "device": device,
        "threads": torch.get_num_threads(),
        "format": FORMAT,
        "made_by": provenance(device)["packages"],
    }
    return Memo(experiment.memo.path, experiment.memo.limit, context)
