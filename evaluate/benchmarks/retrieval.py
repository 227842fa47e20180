"""Retrieval on Karpathy's test splits: does a picture lie near its own captions in the LLM's input space?

A picture is the mean of its projected tokens, a caption the mean of its word embeddings; both are
centred over the test set and compared by cosine. It judges the projector alone: no LLM layer is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.evaluate.benchmarks import BENCHMARKS, Answers, Benchmark, Item, Mode, averaged, collect
from fedcmp.evaluate.metric import Metric, mean
from fedcmp.evaluate.official.caption_files import Captioned, captioned_images
from fedcmp.evaluate.official.files import Problem
from fedcmp.pipeline.models.prompts import CAPTION_PROMPT, question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_AT = (1, 5, 10)


@BENCHMARKS.register("retrieval")
class Retrieval(Benchmark):
    """Recall at 1, 5 and 10, from pictures to captions and back.

    Args:
        annotations: Karpathy's `dataset_coco.json` or `dataset_flickr30k.json`, or COCO's captions file.
        split: Which of Karpathy's splits.
    """

    version = 1
    headlines = ("image to text R@1", "text to image R@1")

    annotations: Path
    split: str = "test"

    @property
    def mode(self) -> Mode:
        """All pictures against all captions."""
        return "retrieve"

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item an image, its captions as the reference."""

        def make(entry: Captioned, place: str) -> Item:
            return Item(entry.id, entry.image, question(CAPTION_PROMPT), entry.captions)

        return collect(captioned_images(self.annotations, self.split), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Answers are the best rank of the image's captions, then the image's rank for each of them."""
        ranks = [[float(rank) for rank in answers[item.id]] for item in items]
        metrics = {}
        for k in _AT:
            metrics[f"image to text R@{k}"] = averaged(items, [float(best < k) for best, *_ in ranks])
            found = np.array([[sum(rank < k for rank in own), len(own)] for _, *own in ranks], float)
            metrics[f"text to image R@{k}"] = Metric([item.image for item in items], found, mean)
        return metrics

    def show_reference(self, item: Item) -> str:
        """The first caption."""
        return str(item.truth[0])


def ranks_of(scores: np.ndarray, owners: Sequence[int]) -> list[list[float]]:
    """Ranks from 0, of what belongs together.

    Args:
        scores: `(captions, images)`.
        owners: The image of every caption.

    Returns:
        For every image the best rank of its captions among all, then its own rank for each of them.
    """
    captions: list[list[int]] = [[] for _ in range(scores.shape[1])]
    for caption, image in enumerate(owners):
        captions[image].append(caption)
    ranks = []
    for image, own in enumerate(captions):
        column = np.ascontiguousarray(scores[:, image])
        best = min(_rank(column, caption) for caption in own)
        ranks.append([best, *(_rank(scores[caption], image) for caption in own)])
    return ranks


def _rank(scores: np.ndarray, place: int) -> float:
    """How many are better, or as good and earlier."""
    mine = scores[place]
    return float((scores > mine).sum() + (scores[:place] == mine).sum())
