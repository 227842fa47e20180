"""SEED-Bench, its image part: multiple choice (Li et al., 2023; AILab-CVC/SEED-Bench)."""

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
from fedcmp.evaluate.official.files import Problem, entries, field, read_json_file, string
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_IMAGE_TYPES = frozenset(range(1, 10))


@BENCHMARKS.register("seed_bench")
class SeedBench(Choice):
    """Accuracy over the nine types of questions about images, and of each type.

    The letter must be the whole answer (LLaVA, convert_seed_for_submission.py). The authors themselves
    rank the options by likelihood: `rank = true`.

    Args:
        path: `SEED-Bench.json`.
    """

    version = 1
    headlines = ("accuracy",)

    path: Path

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Questions of types 1 to 9; those about videos are left out."""
        content = read_json_file(self.path, "SEED-Bench questions")
        types = content.get("question_type") if isinstance(content, dict) else None
        names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else {}

        def make(entry: Any, place: str) -> Item | None:
            kind = field(entry, "question_type_id", place)
            if int(kind) not in _IMAGE_TYPES:
                return None
            options = [string(entry, f"choice_{letter}", place) for letter in "abcd"]
            answer = string(entry, "answer", place)
            if answer not in ("A", "B", "C", "D"):
                raise UserError(f"{place}: answer {answer!r} is not a letter from A to D")
            asked = [string(entry, "question", place)]
            asked += [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
            truth = {"answer": answer, "type": names.get(str(kind), f"type {kind}")}
            return Item(
                str(field(entry, "question_id", place)),
                string(entry, "data_id", place),
                question("\n".join(asked) + LETTER),
                truth,
                ("A", "B", "C", "D"),
            )

        return collect(entries(self.path, "SEED-Bench questions", "questions"), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """By exact equality."""
        points = self.points(items, answers)
        types = [item.truth["type"] for item in items]
        return {"accuracy": averaged(items, points)} | averaged_by("accuracy", items, points, types)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right letter."""
        return [float(answers[item.id] == self.show_reference(item)) for item in items]

    def show_reference(self, item: Item) -> str:
        """The letter."""
        return str(item.truth["answer"])
