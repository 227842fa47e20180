"""POPE: object hallucination by yes/no questions (Li et al., 2023; AoiDragon/POPE)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from evaluate.benchmarks.base import (
    BENCHMARKS,
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Item,
    Metric,
    averaged,
    field,
    ratio,
)
from evaluate.metrics import pope_label
from pipeline.cache import FeatureCache
from pipeline.errors import UserError
from pipeline.prompts import question


@BENCHMARKS.register("pope")
class Pope(Benchmark):
    """Accuracy over all splits, then accuracy and F1 of every split, their mean F1 and yes-ratio.

    Args:
        questions: The official JSON-lines file of each split.
    """

    version = 1

    questions: dict[str, Path] = Field(min_length=1)

    def items(self, cache: FeatureCache) -> list[Item]:
        """Questions of all splits; ids are `split/question_id`."""
        items = []
        for split, path in self.questions.items():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise UserError(f"{path}: POPE questions cannot be read ({error.strerror})") from None
            for number, line in enumerate(lines, 1):
                place = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{place}: not valid JSON: {error}") from None
                items.append(
                    Item(
                        f"{split}/{field(entry, 'question_id', place)}",
                        field(entry, "image", place),
                        question(field(entry, "text", place) + SHORT_ANSWER),
                        field(entry, "label", place),
                    )
                )
        return items

    def score(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, Metric]:
        """By POPE's own parsing rule."""
        said = [pope_label(str(answers[item.id])) == "yes" for item in items]
        true = [item.reference == "yes" for item in items]
        right = [float(a == b) for a, b in zip(said, true, strict=True)]
        splits = [item.id.split("/", 1)[0] for item in items]
        names = list(dict.fromkeys(splits))
        images = [item.image for item in items]

        def counts(split: str) -> np.ndarray:
            """Per question: true positive, said yes, label yes."""
            inside = np.array([name == split for name in splits])[:, None]
            return (
                np.array([[a and b, a, b] for a, b in zip(said, true, strict=True)]).reshape(-1, 3) * inside
            )

        def mean_f1(sums: np.ndarray) -> np.ndarray:
            parts = sums.reshape(*sums.shape[:-1], len(names), 3)
            return ratio(2 * parts[..., 0], parts[..., 1] + parts[..., 2]).mean(-1)

        metrics = {
            "accuracy": averaged(items, right),
            "f1": Metric(
                images, np.concatenate([counts(split) for split in names], 1).astype(float), mean_f1
            ),
        }
        for split in names:
            chosen = [place for place, name in enumerate(splits) if name == split]
            metrics[f"accuracy {split}"] = averaged([items[i] for i in chosen], [right[i] for i in chosen])
        metrics["yes ratio"] = averaged(items, [float(a) for a in said])
        return metrics
