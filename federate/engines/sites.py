"""Rounds over sites that may be slow, silent or gone; knows neither Flower nor any other transport."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedcmp.federate.client.texts import Counts
from fedcmp.federate.compatible import refuse_over_sites
from fedcmp.federate.engines import answers
from fedcmp.federate.engines.base import Engine, SiloCard, terms
from fedcmp.federate.engines.link import Failure, Link
from fedcmp.federate.engines.wire import Payload, job_as_dict, pack, unpack
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.hashes import fingerprint

if TYPE_CHECKING:
    from fedcmp.federate.server.rounds import Train

_POLL = 0.2
_NODES_EVERY = 1.0
_SITES = "sites.json"


@dataclass(frozen=True)
class _Offer:
    """What a site says of itself, and where it is."""

    node: int
    card: SiloCard
    terms: dict[str, Any]
    d_llm: int
    adapter: dict[str, tuple[int, ...]]

    @property
    def base(self) -> dict[str, Any]:
        """What has to be the same at all sites, and only sites know."""
        card = self.card
        widths = {"patches": card.patches, "d_vision": card.d_vision, "d_llm": self.d_llm}
        return {"language": card.language, "features": card.key, "adapter": self.adapter} | widths


@dataclass
class _Round:
    """Messages on their way, and what came of them."""

    requests: Mapping[str, dict[str, Any]]
    deadline: float
    read: Callable[[str, Any], Any]
    waiting: dict[str, tuple[str, int]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def unsent(self) -> list[str]:
        """Silos that nothing was sent to, or whose site left before it answered."""
        busy = {silo for silo, _ in self.waiting.values()}
        return [
            s for s in self.requests if s not in busy and s not in self.answered and s not in self.failures
        ]


class Sites(Engine):
    """Finds sites by name and does rounds with those that answer in time.

    Args:
        experiment: The experiment.
        link: How messages travel.
        owners: The silo of every node's key; None where sites have no keys.

    Raises:
        UserError: The experiment cannot run over sites.
    """

    def __init__(self, experiment: Experiment, link: Link, owners: Mapping[int, str] | None = None) -> None:
        strategy = STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
        refuse_over_sites(experiment, strategy)
        self._experiment, self._link = experiment, link
        self._owners = owners
        self._cards: dict[str, SiloCard] = {}
        self._offers: dict[str, _Offer] = {}
        self._outvoted: dict[str, str] = {}
        self._node: dict[str, int] = {}
        self._known: set[int] = set()
        self._greeted: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._late: dict[str, str] = {}
        self._d_llm = 0
        self._adapter: dict[str, tuple[int, ...]] = {}
        self._voted: tuple[str, dict[str, Any]] | None = None
        self._model: tuple[str, dict[str, Any]] | None = None  # once the run has begun
        self._begun_with: dict[str, SiloCard] = {}
        self._looked = float("-inf")
        self._sent = self._received = 0

    @property
    def d_llm(self) -> int:
        """Width of the LLM's embeddings."""
        return self._d_llm

    @property
    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's matrices by name."""
        return self._adapter

    def cards(self) -> dict[str, SiloCard]:
        """Wait for the sites; those known from before an interruption may be missing up to the quorum."""
        silos, options = self._experiment.federate.silos, self._experiment.sites
        path = self._experiment.run_path / _SITES
        known = {name: SiloCard(**card) for name, card in (read_json(path) or {}).items()}
        needed = self._quorum(len(silos)) if known.keys() >= set(silos) else len(silos)
        if (self._experiment.run_path / "checkpoint.pt").exists():
            self._begun_with = known
        say(f"waiting for {len(silos)} sites: {', '.join(silos)}")
        deadline = time.monotonic() + options.join_timeout
        while len(self._cards) < len(silos) and time.monotonic() < deadline:
            self._look()
            refused = [self._refused[silo] for silo in silos if silo in self._refused]
            if len(silos) - len(refused) < needed:
                raise UserError("; ".join(refused))
            if len(self._offers) + len(refused) >= len(silos):
                break  # all have spoken
            time.sleep(_POLL)
        for reason in self._outvoted.values():
            say(reason)
        if self._outvoted and len(self._cards) < needed:
            raise UserError("; ".join(self._outvoted.values()))
        if len(self._cards) < needed:
            absent = ", ".join(silo for silo in silos if silo not in self._cards)
            raise UserError(
                f"only {len(self._cards)} of {len(silos)} sites joined within sites.join_timeout = "
                f"{options.join_timeout:g} s; missing: {absent}; start them with 'fedcmp site', then run "
                "this again"
            )
        cards = {silo: self._cards.get(silo) or known[silo] for silo in silos}
        write_json(path, {silo: card.plain() for silo, card in cards.items()})
        self._cards, self._model = dict(cards), self._voted
        return cards

    @contextmanager
    def training(self, start: int) -> Iterator[Train]:
        """Sites are ready when they have shown their cards."""
        yield self._train

    def counts(self) -> dict[str, Counts]:
        """What the sites' cards say."""
        return {silo: Counts(card.samples, card.left_out) for silo, card in self._cards.items()}

    def _quorum(self, clients: int) -> int:
        return min(self._experiment.sites.quorum or clients, clients)

    def _train(self, jobs: Sequence[Job]) -> Iterator[LocalResult]:
        """One round; an answer is not kept here once it is given on."""
        began, needed = time.monotonic(), self._quorum(len(jobs))
        requests = {job.client: {"kind": "train", "job": job_as_dict(job)} for job in jobs}
        of = {job.client: job for job in jobs}

        def read(silo: str, reply: Any) -> LocalResult:
            return answers.trained(reply, of[silo], self._cards[silo], self._experiment)

        round_ = self._begun(requests, read)
        for _, result in self._exchange(round_, needed):
            yield result
        answered = len(round_.answered)
        missing = "; ".join(f"{silo}: {reason}" for silo, reason in sorted(round_.failures.items()))
        name = f"round {jobs[0].round + 1} of {jobs[0].rounds}"
        if answered < needed:
            raise UserError(
                f"{name}: {answered} of {len(jobs)} sites answered, fewer than the {needed} of "
                f"sites.quorum ({missing}); run this again to go on after round {jobs[0].round}"
            )
        say(
            f"{name}: {answered} of {len(jobs)} sites in {time.monotonic() - began:.1f} s"
            + (f"; missing: {missing}" if missing else "")
        )

    def traffic(self) -> tuple[int, int]:
        """Bytes of messages, before Flower spares what it has sent already."""
        taken = self._sent, self._received
        self._sent = self._received = 0
        return taken

    def exchange(
        self, requests: Mapping[str, dict[str, Any]], kind: Literal["secure", "align"] = "secure"
    ) -> dict[str, dict[str, Any]]:
        """A step of an alignment, or of a secure round, which sites that are late drop out of."""
        asked = {silo: {"kind": kind, "step": step} for silo, step in requests.items()}
        round_ = self._begun(asked, lambda silo, reply: answers.stepped(reply))
        # A mixture needs all its judges, and a sum goes on without some of its parts.
        replies = dict(self._exchange(round_, 1 if kind == "secure" else len(requests)))
        for silo, reason in sorted(round_.failures.items()):
            what = "dropped out of the secure sum" if kind == "secure" else "did not answer"
            say(f"{silo} {what}: {reason}")
        return replies

    def _begun(self, requests: Mapping[str, dict[str, Any]], read: Callable[[str, Any], Any]) -> _Round:
        """Every site's request, with what both have agreed to."""
        agreed = terms(self._experiment, next(iter(self._cards.values())))
        whole = {silo: request | {"silo": silo, "terms": agreed} for silo, request in requests.items()}
        return _Round(whole, time.monotonic() + self._experiment.sites.round_timeout, read)

    def _exchange(self, round_: _Round, enough: int) -> Iterator[tuple[str, Any]]:
        """Send requests and gather answers, until nothing more can come or time is up.

        Requests become bytes when they are sent: those of all sites at once would be many projectors.
        """
        while time.monotonic() < round_.deadline:
            self._look()
            for silo in round_.unsent:
                if silo in self._node:
                    seconds = round_.deadline - time.monotonic()
                    payload = pack(round_.requests[silo])
                    message = self._link.send(self._node[silo], "train", payload, seconds)
                    round_.waiting[message] = silo, self._node[silo]
                    self._sent += payload.size
            yield from self._gather(round_)
            answered = len(round_.answered)
            absent = len(round_.unsent)
            if not round_.waiting and (answered >= enough or not absent or answered + absent < enough):
                break
            time.sleep(_POLL)
        seconds = self._experiment.sites.round_timeout
        for message, (silo, _) in round_.waiting.items():
            round_.failures[silo] = f"no answer within sites.round_timeout = {seconds:g} s"
            self._late[message] = silo
        for silo in round_.unsent:
            round_.failures.setdefault(silo, self._refused.get(silo, "not connected"))

    def _gather(self, round_: _Round) -> Iterator[tuple[str, Any]]:
        """What has come: every silo with its answer."""
        for message, answer in self._received_of([*round_.waiting, *self._late]):
            if message in self._late:
                say(f"{self._late.pop(message)} answered an earlier round too late; its answer is dropped")
                continue
            silo, node = round_.waiting.pop(message)
            if isinstance(answer, Payload):
                self._received += answer.size
                try:
                    read = round_.read(silo, unpack(answer))
                except ValueError as error:
                    round_.failures[silo] = f"sent an answer that cannot be read ({one_line(error)})"
                    continue
                round_.answered.add(silo)
                yield silo, read
            elif answer.gone:
                self._leave(node)
                self._known.discard(node)  # to be greeted again
            else:
                round_.failures[silo] = answer.reason
        for message, (_, node) in list(round_.waiting.items()):
            if node not in self._known:
                del round_.waiting[message]

    def _received_of(self, messages: Sequence[str]) -> Iterator[tuple[str, Payload | Failure]]:
        """Answers one at a time, as all of them together may not fit into memory."""
        for message in messages:
            yield from self._link.receive([message]).items()

    def _look(self) -> None:
        """See who has come and who has left."""
        for message, answer in self._link.receive(list(self._greeted)).items():
            self._meet(self._greeted.pop(message), answer)
        if time.monotonic() - self._looked < _NODES_EVERY:
            return
        self._looked = time.monotonic()
        nodes = self._link.nodes()
        for node in self._known - nodes:
            self._leave(node)
        self._known &= nodes
        for node in nodes - self._known:
            self._known.add(node)
            hello = pack({"kind": "hello"})
            message = self._link.send(node, "hello", hello, self._experiment.sites.join_timeout)
            self._greeted[message] = node

    def _leave(self, node: int) -> None:
        self._offers = {silo: offer for silo, offer in self._offers.items() if offer.node != node}
        for silo, at in list(self._node.items()):
            if at == node:
                del self._node[silo]
                say(f"{silo} has left")

    def _meet(self, node: int, answer: Payload | Failure) -> None:
        owner = None if self._owners is None else self._owners.get(node, "nobody")
        if isinstance(answer, Failure):
            if answer.gone or owner is None:
                self._known.discard(node)  # to be greeted again
            else:
                self._turn_away(owner, f"site '{owner}' does not take part: {answer.reason}")
            return
        try:
            silo, card, agreed, d_llm, adapter = answers.hello(unpack(answer))
        except ValueError as error:
            who = f"site '{owner}'" if owner else "a site"
            self._turn_away(
                owner,
                f"{who} cannot be understood ({one_line(error)}); give it the server's version of FedCMP",
            )
            return
        if owner not in (None, silo):
            # Nothing is held against the silo that it took the name of.
            say(f"site '{owner}' says that it is '{silo[:40]}' and is refused; its key is that of '{owner}'")
            return
        offer = _Offer(node, card, agreed, d_llm, adapter)
        reason = self._objection(silo, offer)
        if reason is not None:
            self._turn_away(silo, reason)
            return
        self._offers[silo] = offer
        self._choose()

    def _turn_away(self, silo: str | None, reason: str) -> None:
        say(reason)
        if silo in self._experiment.federate.silos:
            self._refused[silo] = reason

    def _objection(self, silo: str, offer: _Offer) -> str | None:
        """Why a site cannot take part, or None."""
        if silo not in self._experiment.federate.silos:
            return f"site '{silo[:40]}' is none of federate.silos; stop it"
        if not self._fits(offer.adapter):
            return f"site '{silo}' has an adapter of another form than federate.adapter has; stop it"
        before = self._cards.get(silo) or self._begun_with.get(silo)
        if before is not None and before.content != offer.card.content:
            return (
                f"site '{silo}' came back with another cache than this run began with; give it that one, or "
                f"remove {self._experiment.run_path} to begin anew"
            )
        return self._disagreement(silo, "the server", terms(self._experiment, offer.card), offer.terms)

    def _fits(self, adapter: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether shapes can be those of the experiment's adapter, as memory is taken for them."""
        options = self._experiment.federate.adapter
        if options is None:
            return not adapter
        ranks = [shape[0] if ".lora_A." in name else shape[1] for name, shape in adapter.items()]
        return bool(ranks) and set(ranks) == {options.rank}

    def _choose(self) -> None:
        """Admit the sites that agree with most others on what only sites know: one alone may be wrong."""
        model = self._model
        if model is None:
            prints = {silo: fingerprint(offer.base) for silo, offer in self._offers.items()}
            ((most, _),) = Counter(prints.values()).most_common(1)
            model = next((silo, offer.base) for silo, offer in self._offers.items() if prints[silo] == most)
        outvoted: dict[str, str] = {}
        for silo, offer in self._offers.items():
            reason = self._disagreement(silo, f"the server and site '{model[0]}'", model[1], offer.base)
            if reason is None:
                self._refused.pop(silo, None)
                if self._node.get(silo) != offer.node:
                    say(f"{silo} is here")
                self._cards[silo], self._node[silo] = offer.card, offer.node
                continue
            self._node.pop(silo, None)
            if self._model is None:
                outvoted[silo] = reason  # until all have spoken
                self._cards.pop(silo, None)
            elif self._refused.get(silo) != reason:
                self._turn_away(silo, reason)
        self._d_llm, self._adapter = model[1]["d_llm"], model[1]["adapter"]
        self._voted, self._outvoted = model, outvoted

    @staticmethod
    def _disagreement(silo: str, others: str, here: dict[str, Any], there: dict[str, Any]) -> str | None:
        found = differences(here, there)
        if not found:
            return None
        return (
            f"site '{silo}' has agreed to something else than {others} ({'; '.join(found)[:500]}); give all "
            "of them the same experiment, LLM and encoder"
        )
