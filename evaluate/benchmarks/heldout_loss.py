"""Held-out loss: negative log-likelihood of a silo's own test texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedcmp.evaluate.benchmarks import BENCHMARKS, Answers, Benchmark, Item, Mode
from fedcmp.evaluate.metric import Metric, mean
from fedcmp.evaluate.official.files import Problem
from fedcmp.pipeline.errors import UserError

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_SHUFFLED = "loss, pictures shuffled"
_OTHERS = 500
_ELSEWHERE = " elsewhere"


@BENCHMARKS.register("heldout_loss")
class HeldoutLoss(Benchmark):
    """Mean negative log-likelihood a supervised token, in nats.

    Args:
        split: Texts of which split of the cache.
        shuffled: Measure 500 of the texts also before a picture that is not theirs. A model that looks at
            pictures loses by it; one that has learnt the texts' form alone does not.
    """

    version = 1
    asks = "caption"
    asks_cache = True
    headlines = ("loss", _SHUFFLED)

    split: Literal["validation", "test"] = "test"
    shuffled: bool = False

    @property
    def mode(self) -> Mode:
        """The likelihood of the texts."""
        return "likelihood"

    def better(self, metric: str) -> Literal["higher", "lower"] | None:
        """Lower; before pictures that are not theirs texts have no loss that is better."""
        return None if metric == _SHUFFLED else "lower"

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """The cache's texts of the split."""
        if cache is None:
            raise UserError("a held-out loss asks about a silo's own texts; extract that silo")
        indices = cache.usable_texts(self.split)
        if not len(indices):
            raise UserError(
                f"{cache.path}: no text of split '{self.split}'; set split = '{self.split}' on the "
                "silo's source and extract it again"
            )
        own = [Item(str(index), cache.ids[cache.text_image[index]], cache.text(index)) for index in indices]
        return [*own, *(_elsewhere(own) if self.shuffled else [])]

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Answers are (summed loss, supervised tokens)."""
        metrics = {}
        for name, wanted in (("loss", False), (_SHUFFLED, True)):
            inside = [item for item in items if item.id.endswith(_ELSEWHERE) is wanted]
            statistics = np.array([answers[item.id] for item in inside], float).reshape(-1, 2)
            if inside:
                metrics[name] = Metric([item.image for item in inside], statistics, mean)
        return metrics


def _elsewhere(items: Sequence[Item]) -> list[Item]:
    """Texts, spread evenly, before the picture half the list away; none where that is their own."""
    step, half = -(-len(items) // _OTHERS), len(items) // 2
    others = [items[(place + half) % len(items)] for place in range(0, len(items), step)]
    return [
        Item(item.id + _ELSEWHERE, other.image, item.text)
        for item, other in zip(items[::step], others, strict=True)
        if other.image != item.image
    ]
