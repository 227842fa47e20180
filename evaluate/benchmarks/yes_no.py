"""Yes/no questions in a table: HallusionBench, AMBER, POPE's of others and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    SHORT_ANSWER,
    YES_NO,
    Answers,
    Choice,
    Item,
    averaged,
    undecided,
)
from fedcmp.evaluate.benchmarks.tabular import Asked, Columns, Judged
from fedcmp.evaluate.metric import Metric, ratio
from fedcmp.evaluate.official.short_answers import yes_no_word
from fedcmp.evaluate.official.tables import Row, filled
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

_TRUTHS = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}


class YesNoColumns(Columns):
    """Names of a table's columns; an answer is yes or no, true or false, 1 or 0."""

    question: str = "question"
    answer: str = "answer"


@BENCHMARKS.register("yes_no")
class YesNo(Judged, Choice):
    """Accuracy; precision, recall and F1 of yes, its share, and that of answers which say neither."""

    version = 1
    headlines = ("accuracy", "f1")

    columns: YesNoColumns = YesNoColumns()

    def asked(self, row: Row, place: str) -> Asked:
        """The question with LLaVA's instruction for short answers."""
        given = filled(row, self.columns.answer, place)
        if given.lower() not in _TRUTHS:
            raise UserError(f"{place}: answer {given!r} is neither yes nor no")
        asked = question(filled(row, self.columns.question, place) + SHORT_ANSWER)
        return asked, {"answer": _TRUTHS[given.lower()]}, YES_NO

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """As VLMEvalKit has it: what says neither is wrong, and no yes."""
        said = [yes_no_word(str(answers[item.id])) for item in items]
        points = self.points(items, answers)
        yes = np.array([each == "yes" for each in said], float)
        true = np.array([item.truth["answer"] == "yes" for item in items], float)
        # Per question: true positive, said yes, label yes, right, one.
        counts = np.stack([yes * true, yes, true, points, np.ones_like(yes)], 1)
        images = [item.image for item in items]
        metrics = {name: Metric(images, counts, value) for name, value in _FIGURES.items()}
        metrics["undecided"] = averaged(items, [float(each is None) for each in said])
        for column in self.group:
            groups = [item.truth["groups"][column] or "none" for item in items]
            for group in sorted(set(groups)):
                inside = [place for place, each in enumerate(groups) if each == group]
                shown = [images[place] for place in inside]
                for name in self.headlines:
                    metrics[f"{name} {column} {group}"] = Metric(shown, counts[inside], _FIGURES[name])
        return metrics | self.all_right(items, points)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right word."""
        return [float(yes_no_word(str(answers[item.id])) == item.truth["answer"]) for item in items]

    def remarks(self, said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        """Answers that say neither yes nor no."""
        return undecided([yes_no_word(each) is None for each in said], "for wrong", rank=self.rank)

    def show_reference(self, item: Item) -> str:
        """The word."""
        return str(item.truth["answer"])


_FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": lambda sums: ratio(sums[..., 3], sums[..., 4]),
    "precision": lambda sums: ratio(sums[..., 0], sums[..., 1]),
    "recall": lambda sums: ratio(sums[..., 0], sums[..., 2]),
    "f1": lambda sums: ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2]),
    "yes ratio": lambda sums: ratio(sums[..., 1], sums[..., 4]),
}
