"""VQAv2: short answers (Goyal et al., 2017; GT-Vision-Lab/VQA)."""

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
from fedcmp.evaluate.official.files import Problem, attempt, entries, field, file_name, string, to_json
from fedcmp.evaluate.official.short_answers import evalai_normalise, vqa_accuracy
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache


@BENCHMARKS.register("vqav2")
class VqaV2(Benchmark):
    """Leave-one-out accuracy, overall and by answer type.

    Args:
        questions: Official questions file.
        annotations: Official annotations file; without it only the submission file is written.
        image_name: How an image id becomes the file name that the cache knows.
        normalise_first: Normalise predictions before the official code, as LLaVA does.
    """

    version = 1
    headlines = ("accuracy",)

    questions: Path
    annotations: Path | None = None
    image_name: str = "COCO_val2014_{image_id:012d}.jpg"
    normalise_first: bool = True

    @property
    def settings(self) -> dict[str, str]:
        """Whether LLaVA's normalisation came first."""
        return {"predictions": "normalised first, as LLaVA" if self.normalise_first else "official code only"}

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Questions joined to their annotations by id."""
        problems: list[Item | Problem] = []
        truths: dict[str, Any] = {}
        if self.annotations is not None:
            for place, entry in entries(self.annotations, "VQAv2 annotations", "annotations"):
                truth = attempt(_truth, entry, place)
                if isinstance(truth, Problem):
                    problems.append(truth)
                else:
                    truths[truth[0]] = truth[1]

        def make(entry: Any, place: str) -> Item:
            number = str(field(entry, "question_id", place))
            if self.annotations is not None and number not in truths:
                raise UserError(f"{self.annotations}: no annotation for question_id {number}")
            image = file_name(self.image_name, field(entry, "image_id", place))
            text = question(string(entry, "question", place) + SHORT_ANSWER)
            return Item(number, image, text, truths.get(number))

        return problems + collect(entries(self.questions, "VQAv2 questions", "questions"), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """By the official leave-one-out rule."""
        points = self.points(items, answers)
        if points is None:
            return {}
        kinds = [item.truth["type"] for item in items]
        return {"accuracy": averaged(items, points)} | averaged_by("accuracy", items, points, kinds)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float] | None:
        """Leave-one-out accuracy of each answer."""
        if self.annotations is None:
            return None
        points = []
        for item in items:
            truth = item.truth
            points.append(
                vqa_accuracy(
                    str(answers[item.id]),
                    truth["answers"],
                    normalise_first=self.normalise_first,
                    numbered=truth["numbered"],
                )
            )
        return points

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """The results file of the evaluation server, normalised as LLaVA submits it."""
        rows = [
            {
                "question_id": int(item.id) if item.id.isdecimal() else item.id,
                "answer": evalai_normalise(str(answers[item.id])),
            }
            for item in items
        ]
        return {"vqav2.json": to_json(rows)}

    def show_reference(self, item: Item) -> str:
        """The annotators' most frequent answer."""
        truth = item.truth or {"answers": [""]}
        return str(max(truth["answers"], key=truth["answers"].count))


def _truth(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    """The question's id, and what the score needs of an annotation."""
    given = field(entry, "answers", place)
    return str(field(entry, "question_id", place)), {
        "answers": annotators([string(each, "answer", place) for each in given], place),
        "numbered": all("answer_id" in each for each in given),
        "type": str(entry.get("answer_type", "other")),
    }
