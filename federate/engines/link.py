"""What carries messages to sites, whatever the transport."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fedcmp.federate.engines.wire import Payload


@dataclass(frozen=True)
class Failure:
    """A site's answer that it could not do what was asked; `gone` where nobody was there to do it."""

    reason: str
    gone: bool = False


class Link(Protocol):
    """How messages travel; nodes are the transport's names for connected sites."""

    def nodes(self) -> set[int]:
        """Who is connected."""

    def send(self, node: int, kind: str, payload: Payload, seconds: float) -> str:
        """Send a message that is void after so many seconds; returns its name."""

    def receive(self, messages: Iterable[str]) -> dict[str, Payload | Failure]:
        """Answers to messages that have arrived since."""
