"""All reward models as the server sees them: it asks their sites, and checks what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.public import as_tensors
from fedcmp.pipeline.errors import UserError

# Steps of silos by name, and what those said who answered.
Ask = Callable[[Mapping[str, dict[str, Any]]], dict[str, dict[str, Any]]]


@dataclass
class Jury:
    """The reward models of an alignment.

    Attributes:
        ground: What server and sites have alike.
        clients: Silos.
        ask: Reaches them.
        deviations: σ_k `(K,)` float32, by which rewards are divided; 1 until they are calibrated.
        contents: What each site says its reward model is.
        accuracies: Share of its own held-out pairs that each ranks right.
        samples: Preferences of each silo.
    """

    ground: Ground
    clients: tuple[str, ...]
    ask: Ask
    deviations: Tensor = field(init=False)
    contents: dict[str, str] = field(default_factory=dict)
    accuracies: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deviations = torch.ones(len(self.clients))

    @property
    def width(self) -> int:
        """Features of a prompt."""
        return self.ground.width

    def fit(self, rounds: int, epochs: Mapping[str, int]) -> None:
        """Have every silo fit its reward model.

        Args:
            rounds: In which they are averaged, so that all end with the same one; none is where 0.
            epochs: Of every silo.
        """
        if not rounds:
            self._fit({client: {} for client in self.clients}, averaged=False)
            return
        common: State | None = None
        for round_ in range(rounds + 1):
            parts = {
                client: [number * round_ // rounds, number * min(round_ + 1, rounds) // rounds]
                for client, number in epochs.items()
            }
            asked = {c: {"epochs": parts[c], "start": common} for c in self.clients}
            common = mean_state(self._fit(asked, averaged=True), self.samples)

    def _fit(self, requests: Mapping[str, dict[str, Any]], *, averaged: bool) -> dict[str, State]:
        states: dict[str, State] = {}
        for client, answer in self._asked({c: {"step": "fit", **r} for c, r in requests.items()}).items():
            said = _Said(client, answer)
            self.contents[client] = said.text("content")
            share = None if answer.get("accuracy") is None else said.number("accuracy", 0, 1)
            self.accuracies[client] = share
            self.samples[client] = int(said.number("pairs", 1, 2**53))
            if averaged:
                states[client] = said.state("state", states.get(self.clients[0]))
        return states

    def scores(self, places: np.ndarray, answers: Sequence[Sequence[list[int]]]) -> Tensor:
        """r̃_k = r_k / σ_k of answers to public questions.

        Args:
            places: `(questions, 2)` int64 of (kind, number).
            answers: Token ids of the answers to each.

        Returns:
            `(K, answers)` float32.
        """
        step = {"step": "score", **as_tensors(places, answers)}
        number = sum(map(len, answers))
        said = self._asked({c: step | {"content": self.contents[c]} for c in self.clients})
        rewards = [_Said(c, said[c]).tensor("rewards", (number,)) for c in self.clients]
        return torch.stack(rewards) / self.deviations[:, None]

    def margins(self) -> tuple[Tensor, Tensor]:
        """Public preferences, kind after kind: h(x) `(n, width)`, and r̃(chosen) - r̃(rejected) `(K, n)`."""
        contexts = [torch.zeros(0, self.width)]
        for pairs in self.ground.public.pairs.values():
            for start in range(0, len(pairs), _AT_ONCE):
                some = pairs.candidates(range(start, min(start + _AT_ONCE, len(pairs))))
                contexts.append(self.ground.context(some.part(range(0, len(some), 2))))
        h = torch.cat(contexts)
        said = self._asked({c: {"step": "margins", "content": self.contents[c]} for c in self.clients})
        rewards = torch.stack([_Said(c, said[c]).tensor("rewards", (len(h), 2)) for c in self.clients])
        return h, (rewards[..., 0] - rewards[..., 1]) / self.deviations[:, None]

    def domain_gradient(self, omega: Tensor) -> tuple[Tensor, float]:
        """Of the mean over all clients' prompts."""
        answers = self._asked({c: {"step": "gradient", "omega": omega} for c in self.clients})
        said = {client: _Said(client, answer) for client, answer in answers.items()}
        gradients = [each.tensor("gradient", tuple(omega.shape)) for each in said.values()]
        total = sum(each.number("samples", 1, 2**53) for each in said.values())
        loss = sum(each.number("loss", 0, 1e30) for each in said.values())
        return torch.stack(gradients).sum(0) / total, loss / total

    def tuned(self, state: State, round_: int) -> tuple[dict[str, State], dict[str, float]]:
        """States and losses of every client after a round of FedDPO, or of learning what was chosen."""
        said = self._asked({c: {"step": "tune", "state": state, "round": round_} for c in self.clients})
        states, losses = {}, {}
        for client in self.clients:
            each = _Said(client, said[client])
            states[client] = each.state("state", state)
            losses[client] = each.number("loss", -1e30, 1e30)
            self.samples[client] = int(each.number("samples", 1, 2**53))
        return states, losses

    def _asked(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Everybody's answer."""
        agreed = {"ground": self.ground.content}
        answers = self.ask({client: {**request, **agreed} for client, request in requests.items()})
        missing = [client for client in requests if client not in answers]
        if missing:
            raise UserError(
                f"no answer from {', '.join(missing)}, as said above, and a mixture needs all its judges: "
                "run this again to go on, or remove them from federate.silos"
            )
        return {client: answers[client] for client in requests}


def mean_state(states: Mapping[str, State], samples: Mapping[str, int]) -> State:
    """FedAvg (McMahan et al., 2017): the mean of weights by number of preferences."""
    total = sum(samples[client] for client in states)
    first = next(iter(states.values()))
    return {
        name: torch.stack([states[client][name] * (samples[client] / total) for client in states]).sum(0)
        for name in first
    }


_AT_ONCE = 64


@dataclass(frozen=True)
class _Said:
    """A site's answer, which is another institution's and may be anything."""

    client: str
    answer: Mapping[str, Any]

    def _refused(self, name: str, what: str) -> UserError:
        remedy = "give it the server's version of FedCMP"
        return UserError(f"site '{self.client}' answered with {name} that {what}; {remedy}")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A finite float32 tensor of a shape."""
        value = self.answer.get(name)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != torch.float32:
            raise self._refused(name, f"is no float32 tensor of shape {shape}")
        if not bool(torch.isfinite(value).all()):
            raise self._refused(name, "has values that are not finite")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        """A finite number within bounds."""
        value: Any = self.answer.get(name)
        if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
            raise self._refused(name, f"is no number from {least:g} to {most:g}")
        return float(value)

    def text(self, name: str) -> str:
        """A hash."""
        value = self.answer.get(name)
        if not isinstance(value, str) or len(value) != 64:
            raise self._refused(name, "is no hash")
        return value

    def state(self, name: str, like: State | None = None) -> State:
        """Finite float32 weights by name, of the names and shapes of others where these are known."""
        value = self.answer.get(name)
        if not isinstance(value, dict) or not all(
            isinstance(key, str) and isinstance(each, Tensor) for key, each in value.items()
        ):
            raise self._refused(name, "is no set of weights")
        if like is not None and value.keys() != like.keys():
            raise self._refused(name, "has other parts than were sent")
        return {
            key: _Said(self.client, value).tensor(key, tuple((like or value)[key].shape)) for key in value
        }
