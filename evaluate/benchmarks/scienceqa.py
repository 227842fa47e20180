"""ScienceQA-IMG: the questions with an image, in LLaVA's form (Lu et al., 2022; lupantech/ScienceQA)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    LETTER,
    Answers,
    Choice,
    Item,
    averaged,
    averaged_by,
    collect,
)
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, entries, field, read_json_file, string, strings
from fedcmp.evaluate.official.short_answers import scienceqa_letter
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question
from fedcmp.pipeline.records import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_LETTERS = "ABCDE"


@BENCHMARKS.register("scienceqa")
class ScienceQa(Choice):
    """Accuracy over the questions that come with an image.

    Args:
        problems: `problems.json`.
        splits: `pid_splits.json`.
        questions: LLaVA's `llava_test_CQM-A.json`.
        split: Which split of `splits`.
    """

    version = 1
    headlines = ("accuracy",)

    problems: Path
    splits: Path
    questions: Path
    split: str = "test"

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """LLaVA's conversations of the split, without those that have no image."""
        problems = read_json_file(self.problems, "ScienceQA problems")
        splits = read_json_file(self.splits, "ScienceQA splits")
        split = set(strings(splits, self.split, str(self.splits)))

        def make(entry: Any, place: str) -> Item | None:
            name = str(field(entry, "id", place))
            if name not in split or "image" not in entry:
                return None
            problem = field(problems, name, str(self.problems))
            number = len(field(problem, "choices", f"{self.problems}: {name}"))
            truth: dict[str, Any] = {"answer": int(problem["answer"]), "choices": number}
            if not 0 <= truth["answer"] < number <= len(_LETTERS):
                raise UserError(f"{self.problems}: {name}: answer {truth['answer']} of {number} choices")
            truth["subject"] = str(problem.get("subject", "unknown"))
            asked = string(entry["conversations"][0], "value", place)
            text = question(asked.replace(IMAGE_PLACEHOLDER, "").strip() + LETTER)
            return Item(name, string(entry, "image", place), text, truth, tuple(_LETTERS[:number]))

        return collect(entries(self.questions, "ScienceQA questions"), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """By LLaVA's parsing rule."""
        points = self.points(items, answers)
        subjects = [item.truth["subject"] for item in items]
        undecided = [float(scienceqa_letter(str(answers[item.id])) is None) for item in items]
        return {
            "accuracy": averaged(items, points),
            "undecided": averaged(items, undecided),
            **averaged_by("accuracy", items, points, subjects),
        }

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right letter; a letter beyond the choices is wrong."""
        return [float(scienceqa_letter(str(answers[item.id])) == self.show_reference(item)) for item in items]

    def show_reference(self, item: Item) -> str:
        """The letter."""
        return _LETTERS[item.truth["answer"]]
