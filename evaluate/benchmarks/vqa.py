"""Questions with short answers in a table: VQA-RAD, SLAKE, PathVQA, A-OKVQA, RealWorldQA and the like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fedcmp.evaluate.benchmarks import BENCHMARKS, SHORT_ANSWER, Answers, Item, averaged
from fedcmp.evaluate.benchmarks.tabular import Asked, Columns, Judged
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.captions import bleu, bleu_score
from fedcmp.evaluate.official.short_answers import (
    aokvqa_accuracy,
    token_overlap,
    vqa_accuracy,
    vqa_normalise,
    yes_no_word,
)
from fedcmp.evaluate.official.tables import Row, cell, filled, text
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

_CLOSED = ("closed", "close", "yes/no")


class VqaColumns(Columns):
    """Names of a table's columns.

    An answer is a text, a number, or a list of what several people said. `type` says of each question
    whether it is `OPEN` or `CLOSED`; without such a column those are closed whose answer is yes or no.
    """

    question: str = "question"
    answer: str = "answer"
    type: str = "answer_type"


@BENCHMARKS.register("vqa")
class Vqa(Judged):
    """Exact match, closed (yes/no) and open questions apart; word recall, F1 and BLEU-1 of open ones.

    Args:
        agreement: How an answer is compared with those of several people: `leave_one_out` as VQAv2 does,
            `thirds` is min(agreeing / 3, 1) as in A-OKVQA, `any` takes each of them for right.
    """

    version = 1
    headlines = ("accuracy", "closed accuracy", "open recall")

    columns: VqaColumns = VqaColumns()
    agreement: Literal["leave_one_out", "thirds", "any"] = "leave_one_out"

    def asked(self, row: Row, place: str) -> Asked:
        """The question with LLaVA's instruction for short answers."""
        given = cell(row, self.columns.answer, place)
        if isinstance(given, list):
            answers = [text(each) for each in given]
        else:
            answers = [filled(row, self.columns.answer, place)]
        if not answers or not all(answers):
            raise UserError(f"{place}: '{self.columns.answer}' is empty")
        if self.agreement == "leave_one_out" and 1 < len(answers) < 4:
            raise UserError(
                f"{place}: {len(answers)} answers, of which leaving one out leaves too few for the right one "
                "to count as 1; set agreement = 'any'"
            )
        asked = question(filled(row, self.columns.question, place) + SHORT_ANSWER)
        return asked, {"answers": answers, "closed": self._is_closed(row, place, answers)}, ()

    def _is_closed(self, row: Row, place: str, answers: Sequence[str]) -> bool:
        if self.columns.type in row.cells or "type" in self.columns.model_fields_set:
            return text(cell(row, self.columns.type, place)).lower() in _CLOSED
        return {vqa_normalise(each) for each in answers} <= {"yes", "no"}

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Recall, F1 and BLEU-1 are of open questions with one answer."""
        points = self.points(items, answers)
        metrics = {"accuracy": averaged(items, points)}
        for name, wanted in (("closed", True), ("open", False)):
            inside = [place for place, item in enumerate(items) if item.truth["closed"] is wanted]
            if 0 < len(inside):
                chosen = [items[place] for place in inside]
                metrics[f"{name} accuracy"] = averaged(chosen, [points[place] for place in inside])
        single = [item for item in items if not item.truth["closed"] and len(item.truth["answers"]) == 1]
        if single:
            metrics |= _words(single, [str(answers[item.id]) for item in single])
        return metrics | self.by_group(items, points) | self.all_right(items, points)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """What each answer is worth: yes or no by VLMEvalKit's rule, others by exact match or agreement."""
        return [self._point(str(answers[item.id]), item.truth) for item in items]

    def _point(self, said: str, truth: dict[str, Any]) -> float:
        given = truth["answers"]
        if len(given) > 1 and self.agreement == "leave_one_out":
            return vqa_accuracy(said, given)
        if len(given) > 1 and self.agreement == "thirds":
            return aokvqa_accuracy(said, given)
        right = {vqa_normalise(each) for each in given}
        if truth["closed"] and right <= {"yes", "no"}:
            return float(yes_no_word(said) in right)
        return float(vqa_normalise(said) in right)

    def show_reference(self, item: Item) -> str:
        """The most frequent answer."""
        given = item.truth["answers"]
        return str(max(given, key=given.count))


def _words(items: Sequence[Item], said: Sequence[str]) -> dict[str, Metric]:
    """What open answers have of the words of their references."""
    references = [item.truth["answers"][0] for item in items]
    overlaps = [token_overlap(*pair) for pair in zip(said, references, strict=True)]
    ngrams = bleu(
        [vqa_normalise(each).split() for each in said], [[vqa_normalise(each).split()] for each in references]
    )
    return {
        "open recall": averaged(items, [recall for _, _, recall in overlaps]),
        "open F1": averaged(items, [f1 for f1, _, _ in overlaps]),
        "open BLEU-1": Metric([item.image for item in items], ngrams, partial(bleu_score, size=1)),
    }
