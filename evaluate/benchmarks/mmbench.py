"""MMBench dev: multiple choice, every question asked in all rotations of its options (Liu et al., 2023)."""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    Answers,
    Choice,
    Item,
    averaged,
    averaged_by,
    choices_prompt,
    collect,
)
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, field, string
from fedcmp.evaluate.official.pictures import picture
from fedcmp.evaluate.official.short_answers import mmbench_option
from fedcmp.evaluate.official.spreadsheet import spreadsheet
from fedcmp.evaluate.official.tables import NO_VALUE, table
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OFFICIAL = 4
_ROTATION = 1_000_000


@BENCHMARKS.register("mmbench")
class MmBench(Choice):
    """Circular accuracy: a question is right only if it is right in every rotation it is asked in.

    Args:
        path: The official TSV, or a parquet file (or a pattern of several) of lmms-lab's MMBench; both hold
            the images. Without answers in it only the submission file is written.
        split: Only rows of this split, where the file has several.
    """

    version = 1
    headlines = ("accuracy", "vanilla accuracy")

    path: Path
    split: str | None = None

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item a row; images are named by the row that holds them."""
        return collect(self._rows(), self._item)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for place, row in table(self.path, "MMBench questions"):
            if isinstance(row, Problem):
                yield place, row
            elif self.split is None or row.cells.get("split") == self.split:
                yield place, row.cells

    def _item(self, row: Any, place: str) -> Item:
        index = _index(row, place)
        choices = {
            letter: row[letter]
            for letter in _LETTERS
            if row.get(letter) is not None and row[letter] not in NO_VALUE
        }
        shown = [
            letter for rank, letter in enumerate(_LETTERS) if set(_LETTERS[: rank + 1]) <= choices.keys()
        ]
        answer = row.get("answer") or ""
        if not shown or answer not in (*_LETTERS, *NO_VALUE):
            raise UserError(f"{place}: no options, or the answer {answer!r} is not a letter")
        if answer not in (*choices, *NO_VALUE):
            raise UserError(f"{place}: the answer {answer!r} is none of the options {', '.join(choices)}")
        hint = row.get("hint") or ""
        hint = "" if hint in NO_VALUE or hint.lower() == "none" else hint
        asked = string(row, "question", place)
        truth = {
            "answer": "" if answer in NO_VALUE else answer,
            "choices": choices,
            "category": row.get("category") or "",
            "l2-category": row.get("l2-category") or row.get("L2-category") or "",
            "question": row["question"],
        }
        text = question(choices_prompt(hint, asked, {letter: choices[letter] for letter in shown}))
        return Item(str(index), _image(row, index), text, truth, tuple(shown))

    def unpack(self, folder: Path) -> None:
        """Write the images of the TSV as `<index>.jpg`; what is there stays, what is no base64 is said."""
        bad = []
        for place, row in self._rows():
            image = row.get("image") or "" if isinstance(row, dict) else ""
            data = "".join(image.split()) if isinstance(image, str) else ""
            if data.isdigit() or isinstance(row, Problem):
                continue
            try:
                path = folder / f"{_index(row, place)}.jpg"
                content = picture(image, place) if not data else base64.b64decode(data, validate=True)
            except (UserError, binascii.Error) as error:
                bad.append(f"{place}: {one_line(error)}")
                continue
            if isinstance(content, bytes) and not path.is_file():
                write_atomic(path, content)
        if bad:
            from fedcmp.pipeline.console import say

            say(f"{self.path}: {len(bad)} images are not base64 and are left out (first: {bad[0]})")

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Undecided answers count as wrong; how many there are is a metric of its own."""
        truths = [item.truth for item in items]
        points = self.points(items, answers)
        if points is None:
            return {}
        groups: dict[int, list[int]] = defaultdict(list)
        for place, item in enumerate(items):
            groups[int(item.id) % _ROTATION].append(place)
        firsts = [places[0] for places in groups.values()]
        asked = [items[place] for place in firsts]
        passed = [min(points[place] for place in places) for places in groups.values()]
        originals = [place for place, item in enumerate(items) if int(item.id) < _ROTATION]
        undecided = [
            float(mmbench_option(str(answers[item.id]), truth["choices"]) is None)
            for item, truth in zip(items, truths, strict=True)
        ]
        metrics = {
            "accuracy": averaged(asked, passed, [str(group) for group in groups]),
            "undecided": averaged(items, undecided, [str(int(item.id) % _ROTATION) for item in items]),
        }
        if originals:
            metrics["vanilla accuracy"] = averaged(
                [items[i] for i in originals], [points[i] for i in originals]
            )
        for level in ("l2-category", "category"):
            metrics |= averaged_by(level, asked, passed, [truths[place][level] for place in firsts])
        return metrics

    def points(self, items: Sequence[Item], answers: Answers) -> list[float] | None:
        """1 for the right letter of one rotation."""
        truths = [item.truth for item in items]
        if not all(truth["answer"] for truth in truths):
            return None
        return [
            float(mmbench_option(str(answers[item.id]), truth["choices"]) == truth["answer"])
            for item, truth in zip(items, truths, strict=True)
        ]

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """The spreadsheet of the evaluation server."""
        rows = []
        most = max((len(item.truth["choices"]) for item in items), default=0)
        letters = _LETTERS[: max(_OFFICIAL, most)]
        for item in items:
            truth = item.truth
            options = [truth["choices"].get(letter, "") for letter in letters]
            rows.append([int(item.id), truth["question"], *options, str(answers[item.id])])
        return {"mmbench.xlsx": spreadsheet(("index", "question", *letters, "prediction"), rows)}

    def show_reference(self, item: Item) -> str:
        """The letter."""
        return str(item.truth["answer"])


def _index(row: Any, place: str) -> int:
    """A row's number, which names its image's file.

    Raises:
        UserError: It is not a number.
    """
    index = str(field(row, "index", place)).strip()
    if not (index.isascii() and index.isdigit()):
        raise UserError(f"{place}: index {index!r} is not a number")
    return int(index)


def _image(row: dict[str, Any], index: int) -> str:
    """An image is in its row, or the row names the one that has it."""
    image = row.get("image")
    named = image.strip() if isinstance(image, str) else ""
    return f"{int(named)}.jpg" if named.isdigit() else f"{index}.jpg"
