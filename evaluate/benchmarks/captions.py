"""Captioning of COCO, Flickr30k or NoCaps: BLEU, ROUGE-L, CIDEr-D, and object F1 if asked for."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import field_validator

from fedcmp.evaluate.benchmarks import BENCHMARKS, Answers, Benchmark, Item, averaged, collect
from fedcmp.evaluate.metric import Metric, ratio
from fedcmp.evaluate.official.caption_files import Captioned, captioned_images
from fedcmp.evaluate.official.captions import bleu, bleu_score, cider_d, object_matches, rouge_l
from fedcmp.evaluate.official.files import Problem, field, to_json
from fedcmp.evaluate.official.ptb import caption_tokens
from fedcmp.pipeline.models.prompts import CAPTION_PROMPT, question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_ENOUGH = 20
_BY_GROUP = ("CIDEr-D", "BLEU-4", "ROUGE-L")


class Captioning(Benchmark, ABC):
    """Captions as coco-caption scores them, wherever their references are.

    A truth is the captions, or a mapping with `captions` and `groups`, values by column.

    Args:
        object_pattern: Regular expression of the object names whose F1 is reported.
    """

    asks = "caption"
    headlines = ("object F1", "CIDEr-D")

    object_pattern: str | None = None

    @field_validator("object_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """CIDEr-D takes its document frequencies from the references of these items, also for groups.

        So the groups' values average to that of all, as NoCaps' published ones of its domains do.
        """
        said = [str(answers[item.id]) for item in items]
        references = [_captions(item) for item in items]
        tokens = [caption_tokens(text) for text in said]
        reference_tokens = [[caption_tokens(text) for text in texts] for texts in references]
        images = [item.image for item in items]
        metrics = {}
        if self.object_pattern is not None:
            pattern = re.compile(self.object_pattern, re.IGNORECASE)
            counts = [
                object_matches(text, texts, pattern) for text, texts in zip(said, references, strict=True)
            ]
            metrics["object F1"] = Metric(images, np.array(counts, float).reshape(-1, 3), _f1)
        metrics["CIDEr-D"] = averaged(items, cider_d(tokens, reference_tokens).tolist())
        ngrams = bleu(tokens, reference_tokens)
        for size in range(1, 5):
            metrics[f"BLEU-{size}"] = Metric(images, ngrams, partial(bleu_score, size=size))
        metrics["ROUGE-L"] = averaged(items, list(map(rouge_l, tokens, reference_tokens)))
        exact = [float(text in texts) for text, texts in zip(tokens, reference_tokens, strict=True)]
        metrics["exact match"] = averaged(items, exact)
        for column in _columns(items):
            groups = [item.truth["groups"][column] or "none" for item in items]
            for group in sorted(set(groups)):
                inside = [place for place, each in enumerate(groups) if each == group]
                metrics |= {f"{name} {column} {group}": _part(metrics[name], inside) for name in _BY_GROUP}
        return metrics

    def remarks(self, said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        """How many captions are different; few are a sign that pictures are not looked at."""
        different = len(set(said))
        warning = None
        if len(said) >= _ENOUGH and different < len(said) / 10:
            warning = (
                f"only {different} different captions of {len(said)}: the model may not look at pictures; "
                "compare a held-out loss with 'shuffled = true'"
            )
        return {"distinct answers": different}, warning

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """A results file as coco-caption reads it."""
        rows = [
            {"image_id": int(item.id) if item.id.isdecimal() else item.id, "caption": str(answers[item.id])}
            for item in items
        ]
        return {"captions.json": to_json(rows)}

    def show_reference(self, item: Item) -> str:
        """The first reference caption."""
        return _captions(item)[0]


@BENCHMARKS.register("captions")
class Captions(Captioning):
    """Captions of COCO, Flickr30k or NoCaps as coco-caption scores them, without Java.

    Args:
        annotations: COCO's or NoCaps' captions file, or Karpathy's `dataset_coco.json` or
            `dataset_flickr30k.json`.
        split: Which of Karpathy's splits.
        group: A field of the images by whose values scores are also given, such as NoCaps' `domain`.
    """

    version = 3

    annotations: Path
    split: str = "test"
    group: str | None = None

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item an image that has references."""

        def make(entry: Captioned, place: str) -> Item:
            truth: Any = entry.captions
            if self.group is not None:
                value = str(field(entry.fields, self.group, place))
                truth = {"captions": entry.captions, "groups": {self.group: value}}
            return Item(entry.id, entry.image, question(CAPTION_PROMPT), truth)

        return collect(captioned_images(self.annotations, self.split), make)


def _captions(item: Item) -> list[str]:
    captions: list[str] = item.truth["captions"] if isinstance(item.truth, dict) else item.truth
    return captions


def _columns(items: Sequence[Item]) -> list[str]:
    first = items[0].truth if items else None
    return list(first.get("groups", {})) if isinstance(first, dict) else []


def _part(metric: Metric, inside: Sequence[int]) -> Metric:
    """A metric of some of its rows."""
    return Metric([metric.images[place] for place in inside], metric.statistics[list(inside)], metric.value)


def _f1(sums: np.ndarray) -> np.ndarray:
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])
