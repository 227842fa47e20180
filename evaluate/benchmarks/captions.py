"""Captioning against COCO-format references: CIDEr-D, exact match, and object F1 if asked for."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import field_validator

from evaluate.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Benchmark,
    Item,
    Metric,
    averaged,
    field,
    ratio,
    read_json_file,
)
from evaluate.metrics import caption_tokens, cider_d, object_matches
from pipeline.cache import FeatureCache
from pipeline.prompts import CAPTION_PROMPT, question


@BENCHMARKS.register("captions")
class Captions(Benchmark):
    """COCO captions, or any file of that form.

    Args:
        annotations: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
        object_pattern: Regular expression of the object names whose F1 is reported.
    """

    version = 1
    asks = "caption"
    headlines = ("object F1", "CIDEr-D")

    annotations: Path
    object_pattern: str | None = None

    @field_validator("object_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    def items(self, cache: FeatureCache) -> list[Item]:
        """One item an image that has references."""
        content, place = read_json_file(self.annotations, "caption annotations"), str(self.annotations)
        references = defaultdict(list)
        for entry in field(content, "annotations", place):
            references[field(entry, "image_id", place)].append(field(entry, "caption", place))
        return [
            Item(
                str(entry["id"]),
                field(entry, "file_name", place),
                question(CAPTION_PROMPT),
                json.dumps(references[entry["id"]]),
            )
            for entry in field(content, "images", place)
            if references.get(field(entry, "id", place))
        ]

    def score(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, Metric]:
        """CIDEr-D takes its document frequencies from the references of these items."""
        said = [str(answers[item.id]) for item in items]
        references = [json.loads(item.reference) for item in items]
        tokens = [caption_tokens(text) for text in said]
        reference_tokens = [[caption_tokens(text) for text in texts] for texts in references]
        metrics = {}
        if self.object_pattern is not None:
            pattern = re.compile(self.object_pattern, re.IGNORECASE)
            counts = [
                object_matches(text, texts, pattern) for text, texts in zip(said, references, strict=True)
            ]
            statistics = np.array(counts, float).reshape(-1, 3)
            metrics["object F1"] = Metric([item.image for item in items], statistics, _f1)
        metrics["CIDEr-D"] = averaged(items, cider_d(tokens, reference_tokens).tolist())
        exact = [float(text in texts) for text, texts in zip(tokens, reference_tokens, strict=True)]
        metrics["exact match"] = averaged(items, exact)
        return metrics

    def show_reference(self, item: Item) -> str:
        """The first reference caption."""
        return str(json.loads(item.reference)[0])


def _f1(sums: np.ndarray) -> np.ndarray:
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])
