"""Multiple choice in a table: MMStar, AI2D, PMC-VQA, A-OKVQA, VLMEvalKit's tables and the like."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from fedcmp.evaluate.benchmarks import BENCHMARKS, LETTER, Answers, Choice, Item, averaged, choices_prompt
from fedcmp.evaluate.benchmarks.tabular import Asked, Columns, Judged, Names
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.short_answers import mmbench_option
from fedcmp.evaluate.official.tables import Row, cell, filled, text
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ABSENT = ("", "nan")  # the second in tables that pandas has made of others


class McqColumns(Columns):
    """Names of a table's columns.

    `options` are columns of an option each, as far as they are there, or the one column that has a list.
    """

    question: str = "question"
    answer: str = "answer"
    hint: str = "hint"
    options: Names = tuple("ABCDEFGHI")


@BENCHMARKS.register("mcq")
class Mcq(Judged, Choice):
    """The share of right letters, and of answers that name none.

    Args:
        answer_as: What an answer is: the option's letter, its number from 0, or its text; by default
            whichever it can be, if it can be one alone.
        letters: Options stand in the question itself, under these letters, such as "ABCD".
    """

    version = 1
    headlines = ("accuracy",)

    columns: McqColumns = McqColumns()
    answer_as: Literal["any", "letter", "number", "text"] = "any"
    letters: str | None = Field(None, pattern="^[A-Z]{2,}$")

    def asked(self, row: Row, place: str) -> Asked:
        """Hint, question and options, as VLMEvalKit asks LLaVA."""
        asked = filled(row, self.columns.question, place)
        choices = dict.fromkeys(self.letters, "") if self.letters else self._choices(row, place)
        letter = self._letter(filled(row, self.columns.answer, place), choices, place)
        truth = {"answer": letter, "choices": choices}
        if self.letters:
            return question(asked + LETTER), truth, tuple(choices)
        hint = text(row.cells.get(self.columns.hint))
        hint = "" if hint.lower() in (*_ABSENT, "none") else hint
        return question(choices_prompt(hint, asked, choices)), truth, tuple(choices)

    def _choices(self, row: Row, place: str) -> dict[str, str]:
        """Options by their letters, from A without a gap; one that begins with its letter loses that."""
        columns = self.columns.options
        if len(columns) == 1:
            said = [text(each) for each in _listed(cell(row, columns[0], place), f"{place}, '{columns[0]}'")]
        else:
            there = [text(row.cells.get(column)) for column in columns]
            said = [each for each in there if each not in _ABSENT]
            if said != there[: len(said)]:
                raise UserError(f"{place}: options {', '.join(columns)} have a gap; is a cell empty?")
        if not 2 <= len(said) <= len(_LETTERS) or not all(said):
            raise UserError(f"{place}: {len(said)} options in {', '.join(columns)}, or an empty one")
        choices = dict(zip(_LETTERS, said, strict=False))
        marked = [re.fullmatch(rf"{letter}\s?[:.)]\s?(.*\S.*)", each) for letter, each in choices.items()]
        if all(marked):
            return {letter: match[1] for letter, match in zip(choices, marked, strict=True) if match}
        return choices

    def _letter(self, given: str, choices: Mapping[str, str], place: str) -> str:
        """The letter that an answer means.

        Raises:
            UserError: It is no option, or may be several.
        """
        numbered = list(choices)[int(given) :][:1] if given.isdecimal() else []
        readings = {
            "letter": [given] if given in choices else [],
            "number": numbered,
            "text": [letter for letter, said in choices.items() if _bare(said) == _bare(given, choices)],
        }
        kinds = [kind for kind in readings if self.answer_as in ("any", kind) and readings[kind]]
        meant = {letter for kind in kinds for letter in readings[kind]}
        if len(meant) == 1:
            return meant.pop()
        told = "; ".join(f"{letter}. {said}" for letter, said in choices.items())
        if meant:
            how = " or ".join(f"'{kind}'" for kind in kinds)
            raise UserError(f"{place}: answer {given!r} may be several of {told}; set answer_as = {how}")
        raise UserError(f"{place}: answer {given!r} is none of {told}")

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Answers from which no letter follows are wrong."""
        points = self.points(items, answers)
        undecided = [float(_chosen(answers[item.id], item) is None) for item in items]
        metrics = {"accuracy": averaged(items, points), "undecided": averaged(items, undecided)}
        return metrics | self.by_group(items, points) | self.all_right(items, points)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right letter, by VLMEvalKit's rule without a judge."""
        return [float(_chosen(answers[item.id], item) == item.truth["answer"]) for item in items]

    def show_reference(self, item: Item) -> str:
        """The letter."""
        return str(item.truth["answer"])


def _chosen(answer: Any, item: Item) -> str | None:
    return mmbench_option(str(answer), item.truth["choices"])


def _bare(said: str, choices: Mapping[str, str] | None = None) -> str:
    """An option's text for comparison; an answer may begin with the letter, too."""
    marked = re.fullmatch(r"([A-Z])\s?[:.)]\s?(.*)", said) if choices else None
    known = marked is not None and marked[1] in (choices or {})
    return (marked[2] if marked is not None and known else said).strip().lower()


def _listed(value: Any, place: str) -> list[Any]:
    """A list of options; tables of texts have it as JSON or as Python writes it.

    Raises:
        UserError: It is none.
    """
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    if not isinstance(value, list | tuple):
        raise UserError(f"{place}: not a list of options")
    return list(value)
