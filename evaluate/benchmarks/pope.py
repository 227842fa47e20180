"""POPE: object hallucination by yes/no questions (Li et al., 2023; AoiDragon/POPE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    SHORT_ANSWER,
    YES_NO,
    Answers,
    Choice,
    Item,
    collect,
    undecided,
)
from fedcmp.evaluate.metric import Metric, ratio
from fedcmp.evaluate.official.files import Problem, field, json_lines, string
from fedcmp.evaluate.official.pictures import picture, picture_name, write_pictures
from fedcmp.evaluate.official.short_answers import pope_decides, pope_label
from fedcmp.evaluate.official.tables import Row, is_table, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache


@BENCHMARKS.register("pope")
class Pope(Choice):
    """Mean F1 over the splits and accuracy over all; then every split's official five figures.

    Args:
        questions: The official JSON-lines file of each split, or a parquet file (or a pattern of several) of
            lmms-lab's POPE, which has the pictures; of its column `category` a split takes its own rows.
    """

    version = 1
    headlines = ("f1", "accuracy")

    questions: dict[str, Path] = Field(min_length=1)

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Questions of all splits; ids are `split/question_id`."""
        found: list[Item | Problem] = []
        for split, path in self.questions.items():

            def make(entry: Any, place: str, split: str = split) -> Item:
                label = string(entry, "label", place).strip().lower()
                if label not in ("yes", "no"):
                    raise UserError(f"{place}: label {entry['label']!r} is neither yes nor no")
                text = question(string(entry, "text", place) + SHORT_ANSWER)
                number = field(entry, "question_id", place)
                return Item(f"{split}/{number}", _image(entry, place), text, label, YES_NO)

            found += collect(_lines(path, split), make)
        return found

    def unpack(self, folder: Path) -> None:
        """Write the pictures that are in parquet files."""
        for path in {*self.questions.values()}:
            found = (picture(row.cells.get("image"), place) for place, row in _rows(path))
            write_pictures(((picture_name(each), each) for each in found if isinstance(each, bytes)), folder)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """By POPE's own parsing rule."""
        said = np.array([pope_label(str(answers[item.id])) == "yes" for item in items], float)
        true = np.array([item.truth == "yes" for item in items], float)
        splits = np.array([item.id.split("/", 1)[0] for item in items])
        images = [item.image for item in items]
        names = list(dict.fromkeys(splits.tolist()))
        # Per question: true positive, said yes, label yes, right, one.
        counts = np.stack([said * true, said, true, said == true, np.ones_like(said)], 1)
        by_split = np.concatenate([counts * (splits == name)[:, None] for name in names], 1)

        def mean_f1(sums: np.ndarray) -> np.ndarray:
            return _f1(sums.reshape(*sums.shape[:-1], len(names), counts.shape[1])).mean(-1)

        metrics = {"f1": Metric(images, by_split, mean_f1), "accuracy": Metric(images, counts, _accuracy)}
        for name in names:
            inside = splits == name
            shown = [image for image, kept in zip(images, inside, strict=True) if kept]
            for figure, value in _FIGURES.items():
                metrics[f"{figure} {name}"] = Metric(shown, counts[inside], value)
        return metrics

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right word."""
        return [float(pope_label(str(answers[item.id])) == item.truth) for item in items]

    def remarks(self, said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        """Answers that say neither yes nor no."""
        return undecided([not pope_decides(each) for each in said], "for yes", rank=self.rank)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of parquet files; there are none in any other."""
    rows = table(path, "POPE questions") if is_table(path) else iter(())
    return ((place, row) for place, row in rows if isinstance(row, Row))


def _lines(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Entries of an official file, or a split's rows in the form of such entries."""
    if not is_table(path):
        return json_lines(path, "POPE questions")
    names = {"question": "text", "answer": "label"}
    return (
        (place, {names.get(name, name): value for name, value in row.cells.items()})
        for place, row in _rows(path)
        if row.cells.get("category", split) == split
    )


def _image(entry: Any, place: str) -> str:
    if isinstance(entry.get("image"), dict | bytes):
        found = picture(entry["image"], place)
        return picture_name(found) if isinstance(found, bytes) else str(found)
    return string(entry, "image", place)


def _f1(sums: np.ndarray) -> np.ndarray:
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 3], sums[..., 4])


_FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "precision": lambda sums: ratio(sums[..., 0], sums[..., 1]),
    "recall": lambda sums: ratio(sums[..., 0], sums[..., 2]),
    "f1": _f1,
    "yes ratio": lambda sums: ratio(sums[..., 1], sums[..., 4]),
}
