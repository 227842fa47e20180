"""Held-out loss: negative log-likelihood of a silo's own test texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from evaluate.benchmarks.base import BENCHMARKS, Answers, Benchmark, Item, Metric, Mode, Problem, mean
from pipeline.cache import FeatureCache
from pipeline.errors import UserError


@BENCHMARKS.register("heldout_loss")
class HeldoutLoss(Benchmark):
    """Mean negative log-likelihood a supervised token, in nats.

    Args:
        split: Texts of which split of the cache.
    """

    version = 1
    asks = "caption"
    headlines = ("loss",)

    split: Literal["validation", "test"] = "test"

    @property
    def mode(self) -> Mode:
        """The likelihood of the texts."""
        return "likelihood"

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
        return [Item(str(index), cache.ids[cache.text_image[index]], cache.text(index)) for index in indices]

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Answers are (summed loss, supervised tokens)."""
        statistics = np.array([answers[item.id] for item in items], float).reshape(-1, 2)
        return {"loss": Metric([item.image for item in items], statistics, mean)}
