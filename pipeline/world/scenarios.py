"""How data differ between silos: the embedded default and the scenarios of the laboratory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedcmp.pipeline.world.scenes import COLOURS, DOMAINS, SHAPES, Content
from fedcmp.pipeline.world.tasks import CLIENTS

_QUANTITY_SHARES = (1, 2, 3, 5, 6, 7)


@dataclass(frozen=True)
class Silo:
    """A silo to write.

    Attributes:
        name: Its folder.
        images: How many it holds.
        content: Draws what its scenes are like.
        mismatched: Whether captions describe other scenes than the pictures show.
        task: What its texts are of `tasks`; captions by default.
    """

    name: str
    images: int
    content: Callable[[np.random.Generator], Content]
    mismatched: bool = False
    task: str | None = None


def _skewed(
    concentration: float, domain: str | None = None, floor: float = 0.0
) -> Callable[[np.random.Generator], Content]:
    """Colours and shapes skewed by a Dirichlet, in one rendering domain or in all."""

    def draw(rng: np.random.Generator) -> Content:
        return Content(
            domain=[float(domain is None or name == domain) for name in DOMAINS],
            colour=(rng.dirichlet([concentration] * len(COLOURS)) + floor).tolist(),
            shape=(rng.dirichlet([concentration] * len(SHAPES)) + floor).tolist(),
        )

    return draw


def _drawn_as(domains: Sequence[str]) -> Callable[[np.random.Generator], Content]:
    return lambda rng: Content(domain=[float(name in domains) for name in DOMAINS])


def _uniform(domain: str | None = None) -> Callable[[np.random.Generator], Content]:
    return lambda rng: Content(domain=[float(domain is None or name == domain) for name in DOMAINS])


def _demo(images: int) -> list[Silo]:
    """One rendering domain a silo, colours and shapes skewed (concentration 0.5)."""
    return [Silo(name, images // 6, _skewed(0.5, name, 0.02)) for name in DOMAINS]


def _content(images: int) -> list[Silo]:
    """S1, content skew: six silos with all domains, colours and shapes at concentration 0.1."""
    return [Silo(f"site{k}", images // 6, _skewed(0.1)) for k in range(1, 7)]


def _domain(images: int) -> list[Silo]:
    """S2, domain skew: one rendering domain and its caption style a silo."""
    return [Silo(name, images // 6, _uniform(name)) for name in DOMAINS]


def _quantity(images: int) -> list[Silo]:
    """S3, quantity skew from 1 to 7, and two silos with a quarter of the data whose captions mismatch."""
    eighth = images // 8
    unit = (images - 2 * eighth) // sum(_QUANTITY_SHARES)
    honest = [Silo(f"site{k}", share * unit, _uniform()) for k, share in enumerate(_QUANTITY_SHARES, 1)]
    return honest + [Silo(f"site{k}", eighth, _uniform(), mismatched=True) for k in (7, 8)]


def _many(images: int) -> list[Silo]:
    """S4, many small silos, each with skewed colours and shapes (concentration 0.3)."""
    return [Silo(f"site{k:02d}", images // 24, _skewed(0.3)) for k in range(1, 25)]


def _tasks(images: int) -> list[Silo]:
    """Nine silos, three of each task, two rendering domains a silo."""
    return [
        Silo(name, images // len(CLIENTS), _drawn_as(domains), task=task)
        for name, (task, domains) in CLIENTS.items()
    ]


SCENARIOS: dict[str, Callable[[int], list[Silo]]] = {
    "demo": _demo,
    "content": _content,
    "domain": _domain,
    "quantity": _quantity,
    "many": _many,
    "tasks": _tasks,
}
