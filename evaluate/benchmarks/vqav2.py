"""VQAv2: short answers (Goyal et al., 2017; GT-Vision-Lab/VQA)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluate.benchmarks.base import (
    BENCHMARKS,
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Item,
    Metric,
    averaged,
    field,
    read_json_file,
)
from evaluate.metrics import vqa_accuracy
from pipeline.cache import FeatureCache
from pipeline.errors import UserError
from pipeline.prompts import question


@BENCHMARKS.register("vqav2")
class VqaV2(Benchmark):
    """Leave-one-out accuracy, overall and by answer type.

    Args:
        questions: Official questions file.
        annotations: Official annotations file.
        image_name: How an image id becomes the file name that the cache knows.
        normalise_first: Normalise predictions before the official code, as LLaVA does.
    """

    version = 1
    headlines = ("accuracy",)

    questions: Path
    annotations: Path
    image_name: str = "COCO_val2014_{image_id:012d}.jpg"
    normalise_first: bool = True

    def items(self, cache: FeatureCache) -> list[Item]:
        """Questions joined to their annotations by id."""
        place = str(self.annotations)
        listed = field(read_json_file(self.annotations, "VQAv2 annotations"), "annotations", place)
        truths = {field(entry, "question_id", place): entry for entry in listed}
        place = str(self.questions)
        items = []
        for entry in field(read_json_file(self.questions, "VQAv2 questions"), "questions", place):
            number = field(entry, "question_id", place)
            if number not in truths:
                raise UserError(f"{self.annotations}: no annotation for question_id {number}")
            try:
                image = self.image_name.format(image_id=field(entry, "image_id", place))
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(f"image_name = {self.image_name!r} does not fit the ids: {error}") from None
            text = question(field(entry, "question", place) + SHORT_ANSWER)
            items.append(Item(str(number), image, text, json.dumps(truths[number])))
        return items

    def score(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, Metric]:
        """By the official leave-one-out rule."""
        values, kinds = [], []
        for item in items:
            truth = json.loads(item.reference)
            values.append(
                vqa_accuracy(
                    str(answers[item.id]),
                    [annotator["answer"] for annotator in truth["answers"]],
                    normalise_first=self.normalise_first,
                    numbered=all("answer_id" in annotator for annotator in truth["answers"]),
                )
            )
            kinds.append(truth.get("answer_type", "other"))
        metrics = {"accuracy": averaged(items, values)}
        for kind in sorted(set(kinds)):
            chosen = [place for place, name in enumerate(kinds) if name == kind]
            metrics[f"accuracy {kind}"] = averaged([items[i] for i in chosen], [values[i] for i in chosen])
        return metrics

    def show_reference(self, item: Item) -> str:
        """The annotators' most frequent answer."""
        answers = [annotator["answer"] for annotator in json.loads(item.reference)["answers"]]
        return str(max(answers, key=answers.count))
