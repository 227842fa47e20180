"""VizWiz: questions that blind people asked about their photographs (Gurari et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    SHORT_ANSWER,
    Answers,
    Benchmark,
    Item,
    annotators,
    averaged,
    averaged_by,
    collect,
)
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, entries, string, to_json
from fedcmp.evaluate.official.short_answers import evalai_normalise, vizwiz_accuracy
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@BENCHMARKS.register("vizwiz")
class VizWiz(Benchmark):
    """Leave-one-out accuracy, overall and by answer type.

    Args:
        annotations: `val.json`, or `test.json`, which has no answers: then only the submission file is
            written.
    """

    version = 1
    headlines = ("accuracy",)

    annotations: Path

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item an image, which names it."""

        def make(entry: Any, place: str) -> Item:
            image = string(entry, "image", place)
            truth = None
            if "answers" in entry:
                given = [string(each, "answer", place) for each in entry["answers"]]
                truth = {"answers": annotators(given, place), "type": str(entry.get("answer_type", "other"))}
            text = question(string(entry, "question", place) + _HINT + SHORT_ANSWER)
            return Item(image, image, text, truth)

        return collect(entries(self.annotations, "VizWiz annotations"), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """By the official leave-one-out rule; images without answers count nowhere."""
        known = [item for item in items if item.truth]
        points = self.points(known, answers)
        if not points:
            return {}
        kinds = [item.truth["type"] for item in known]
        return {"accuracy": averaged(known, points)} | averaged_by("accuracy", known, points, kinds)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float] | None:
        """Leave-one-out accuracy of each answer."""
        truths = [item.truth for item in items]
        if not all(truths):
            return None
        return [
            vizwiz_accuracy(str(answers[item.id]), truth["answers"])
            for item, truth in zip(items, truths, strict=True)
        ]

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """The results file of the evaluation server, normalised as LLaVA submits it."""
        rows = [{"image": item.image, "answer": evalai_normalise(str(answers[item.id]))} for item in items]
        return {"vizwiz.json": to_json(rows)}

    def show_reference(self, item: Item) -> str:
        """The most frequent answer."""
        truth = item.truth or {"answers": [""]}
        return str(max(truth["answers"], key=truth["answers"].count))
