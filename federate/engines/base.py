"""What an engine is: where the clients of a run are, and how they are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedcmp.federate.client.texts import Counts
from fedcmp.federate.privacy.ledger import Ledger
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.identity import federate_options, language_identity, written_by

if TYPE_CHECKING:
    from fedcmp.federate.server.rounds import Train


@dataclass(frozen=True)
class SiloCard:
    """What the server has to know of a silo; plain data, and nothing of any image or text.

    Attributes:
        content: SHA-256 of its feature cache; under a key of the site's where its texts are private.
        key: What made the features: encoder, preprocessing, dtype.
        patches: Tokens an image.
        d_vision: Width of a token.
        samples: Training texts, those that cannot be trained on included until the site is ready.
        left_out: Training texts that cannot be trained on.
        language: The frozen LLM's files and dtype.
    """

    content: str
    key: dict[str, Any]
    patches: int
    d_vision: int
    samples: int
    language: dict[str, Any]
    left_out: int = 0

    @classmethod
    def of(cls, cache: FeatureCache, experiment: Experiment, counts: Counts | None = None) -> SiloCard:
        """The card of a silo on this machine; without counts, its texts have not been looked at."""
        samples, left_out = counts or Counts(len(cache.usable_texts("train")), 0)
        options, content = experiment.federate.clipped, cache.content
        if options is not None and options.noisy:
            content = Ledger(experiment.ledger).pseudonym(content)
        return cls(
            content=content,
            key=cache.manifest["key"],
            patches=cache.patches,
            d_vision=cache.d_vision,
            samples=samples,
            language=language_identity(experiment),
            left_out=left_out,
        )

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Engine(ABC):
    """Where the clients of a run are."""

    @abstractmethod
    def cards(self) -> dict[str, SiloCard]:
        """Every silo's card.

        Raises:
            UserError: A silo is missing, or does not fit the others or the experiment.
        """

    @abstractmethod
    def training(self, start: int) -> AbstractContextManager[Train]:
        """Make ready to train from round `start` on."""

    @abstractmethod
    def exchange(
        self, requests: Mapping[str, dict[str, Any]], kind: Literal["secure", "align"] = "secure"
    ) -> dict[str, dict[str, Any]]:
        """Take a step with some clients, of a secure round or an alignment; what those said who answered."""

    @abstractmethod
    def counts(self) -> dict[str, Counts]:
        """Every silo's texts, those that cannot be trained on apart; known while training."""

    def traffic(self) -> tuple[int, int]:
        """Bytes sent to clients, and received from them, since this was asked last."""
        return 0, 0

    @property
    @abstractmethod
    def d_llm(self) -> int:
        """Width of the LLM's embeddings; known while training."""

    @property
    @abstractmethod
    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's matrices by name, none without one; known while training."""


def terms(experiment: Experiment, card: SiloCard) -> dict[str, Any]:
    """What server and sites must agree on: all that decides the bytes of a site's results.

    The initial projector is the server's alone, as every job brings the weights to start from.
    """
    aligned = {} if experiment.align is None else {"align": experiment.align.agreed()}
    return {
        "seed": experiment.seed,
        **aligned,
        "federate": federate_options(experiment),
        "language": card.language | written_by(experiment),
        "features": card.key,
    }
