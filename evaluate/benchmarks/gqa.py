"""GQA: compositional questions with one-word answers (Hudson and Manning, 2019)."""

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
    averaged,
    collect,
)
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, field, file_name, read_json_file, string
from fedcmp.evaluate.official.short_answers import gqa_answer
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache


@BENCHMARKS.register("gqa")
class Gqa(Benchmark):
    """Exact match over the balanced questions: all, binary and open.

    Args:
        questions: `{tier}_questions.json`.
        image_name: How an image id becomes the file name that the cache knows.
    """

    version = 1
    headlines = ("accuracy",)

    questions: Path
    image_name: str = "{image_id}.jpg"

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Questions by id; the unbalanced ones count nowhere and are not asked."""
        content = read_json_file(self.questions, "GQA questions")
        if not isinstance(content, dict):
            raise UserError(f"{self.questions}: expected an object of questions by id")

        def make(entry: Any, place: str) -> Item | None:
            if not field(entry, "isBalanced", place):
                return None
            truth = {
                "answer": string(entry, "answer", place),
                "type": field(entry, "types", place)["structural"],
            }
            image = file_name(self.image_name, field(entry, "imageId", place))
            text = question(string(entry, "question", place) + SHORT_ANSWER)
            return Item(place.removeprefix(f"{self.questions}: "), image, text, truth)

        return collect(((f"{self.questions}: {name}", entry) for name, entry in content.items()), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Open questions are those of the structural type `query`."""
        points = self.points(items, answers)
        metrics = {"accuracy": averaged(items, points)}
        is_open = [item.truth["type"] == "query" for item in items]
        for name, wanted in (("binary", False), ("open", True)):
            inside = [place for place, each in enumerate(is_open) if each is wanted]
            if inside:
                metrics[name] = averaged([items[i] for i in inside], [points[i] for i in inside])
        return metrics

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the very word."""
        return [float(gqa_answer(str(answers[item.id])) == self.show_reference(item)) for item in items]

    def show_reference(self, item: Item) -> str:
        """The word."""
        return str(item.truth["answer"])
