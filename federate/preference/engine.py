"""Where the silos of an alignment are, and how they are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from fedcmp.federate.engines.base import SiloCard
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.judges import Judges
from fedcmp.pipeline.cache import open_cache, same_key
from fedcmp.pipeline.config import Experiment


class Court(ABC):
    """Where they are."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    @abstractmethod
    def cards(self) -> dict[str, SiloCard]:
        """Every silo's card."""

    @abstractmethod
    def ask(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Take a step with some silos; returns what those said who answered."""


class LocalCourt(Court):
    """All silos in this process."""

    def __init__(self, experiment: Experiment, ground: Ground) -> None:
        self._experiment = experiment
        self._caches = {name: open_cache(experiment, name) for name in experiment.federate.silos}
        same_key(self._caches)
        self._judges = Judges(experiment, self._caches, ground)

    def cards(self) -> dict[str, SiloCard]:
        """Of the caches on this machine."""
        counts = self._judges.counts
        return {
            name: SiloCard.of(cache, self._experiment, counts[name]) for name, cache in self._caches.items()
        }

    def ask(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """One after the other."""
        return {name: self._judges(name, step) for name, step in requests.items()}
