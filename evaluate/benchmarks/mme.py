"""MME: fourteen kinds of yes/no questions, two an image (Fu et al., 2023; BradyFU/MME_Benchmark)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    SHORT_ANSWER,
    YES_NO,
    Answers,
    Choice,
    Item,
    averaged,
    collect,
    undecided,
)
from fedcmp.evaluate.metric import Metric, ratio
from fedcmp.evaluate.official.files import Problem, read_text_file
from fedcmp.evaluate.official.pictures import picture, write_pictures
from fedcmp.evaluate.official.short_answers import mme_label
from fedcmp.evaluate.official.tables import Row, is_table, table, text
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_SUFFIXES = (".jpg", ".png", ".jpeg")


@BENCHMARKS.register("mme")
class Mme(Choice):
    """Perception (2000 at most), cognition (800), their total, and every category (200).

    A category is 100 x accuracy + 100 x the share of images with both questions right. Sums are
    given where all of their categories are there.

    Args:
        path: The folder of categories, `MME_Benchmark_release_version`; images are in it, too. Or a parquet
            file, or a pattern of several, of lmms-lab's MME, which has the pictures.
    """

    version = 1
    headlines = ("perception", "cognition", "total")

    path: Path

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Two questions an image; ids are `category/image#line`."""
        if is_table(self.path):
            return collect(self._of_table(), self._item)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; set 'path' to MME_Benchmark_release_version")
        found = collect(self._lines(), self._item)
        if not found:
            raise UserError(
                f"{self.path}: no questions of MME; expected CATEGORY/NAME.txt beside NAME.jpg or NAME.png, "
                "or CATEGORY/questions_answers_YN/NAME.txt and CATEGORY/images/NAME.jpg, with a question, "
                f"a tab and Yes or No on each of two lines; categories: {', '.join(PERCEPTION + COGNITION)}"
            )
        return found

    def _lines(self) -> Iterator[tuple[str, Any]]:
        for category in (*PERCEPTION, *COGNITION):
            folder = self.path / category
            nested = (folder / "questions_answers_YN").is_dir()
            for file in sorted((folder / "questions_answers_YN" if nested else folder).glob("*.txt")):
                images = folder / "images" if nested else folder
                suffix = next((s for s in _SUFFIXES if (images / (file.stem + s)).is_file()), _SUFFIXES[0])
                image = str((images / (file.stem + suffix)).relative_to(self.path))
                try:
                    lines = read_text_file(file, "MME questions").split("\n")
                except UserError as error:
                    yield str(file), Problem(str(error))
                    continue
                filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
                if len(filled) != 2:
                    yield str(file), Problem(f"{file}: {len(filled)} questions about an image, not 2")
                for number, line in filled[:2]:
                    yield f"{file}:{number}", (category, image, number, line.rstrip("\r"))

    def _of_table(self) -> Iterator[tuple[str, Any]]:
        """Rows in the form of lines; pictures are named by `question_id`, `category/name.png`."""
        asked: dict[tuple[str, str], int] = {}
        for place, row in table(self.path, "MME questions"):
            if isinstance(row, Problem):
                yield place, row
                continue
            cells = [text(row.cells.get(name)) for name in ("category", "question_id", "question", "answer")]
            category, image, question, answer = cells
            if category not in (*PERCEPTION, *COGNITION) or not image:
                yield place, Problem(f"{place}: no category of MME, or no question_id")
                continue
            number = asked[category, image] = asked.get((category, image), 0) + 1
            yield place, (category, image, number, f"{question}\t{answer}")
        for (category, image), number in asked.items():
            if number != 2:
                reason = f"{self.path}: {number} questions about {image} in {category}, not 2"
                yield str(self.path), Problem(reason)

    def unpack(self, folder: Path) -> None:
        """Write the pictures that are in parquet files."""
        if is_table(self.path):
            rows = table(self.path, "MME questions", {"question_id", "image"})
            pairs = ((row.cells, place) for place, row in rows if isinstance(row, Row))
            found = ((text(cells["question_id"]), picture(cells["image"], place)) for cells, place in pairs)
            wanted = {each.image for each in self.items(None) if isinstance(each, Item)}
            write_pictures(
                ((name, each) for name, each in found if name in wanted and isinstance(each, bytes)), folder
            )

    def _item(self, entry: Any, place: str) -> Item:
        category, image, number, line = entry
        said, tab, label = line.partition("\t")
        if not tab or label.strip().lower() not in ("yes", "no"):
            raise UserError(f"{place}: expected a question, a tab and Yes or No, found {line[:60]!r}")
        asked = said.replace(" Please answer yes or no.", "") + SHORT_ANSWER
        return Item(f"{category}/{image}#{number}", image, question(asked), label.strip().lower(), YES_NO)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Images are resampled within their categories."""
        right = self.points(items, answers)
        categories = [item.id.split("/", 1)[0] for item in items]
        # One row an image: questions right, questions, both right, one; a block of them a category.
        by_image: dict[tuple[str, str], list[float]] = {}
        for category, item, point in zip(categories, items, right, strict=True):
            by_image.setdefault((category, item.image), []).append(point)
        rows = np.array([[sum(p), len(p), float(sum(p) == 2), 1.0] for p in by_image.values()]).reshape(-1, 4)
        strata = [category for category, _ in by_image]
        images = [f"{category}/{image}" for category, image in by_image]

        def total(names: Sequence[str]) -> Metric:
            inside = [[name == stratum for stratum in strata] for name in names]
            blocks = np.concatenate([rows * np.array(each)[:, None] for each in inside], 1)

            def value(sums: np.ndarray) -> np.ndarray:
                return _category(sums.reshape(*sums.shape[:-1], len(names), 4)).sum(-1)

            return Metric(images, blocks, value, strata)

        sums = {"perception": PERCEPTION, "cognition": COGNITION, "total": (*PERCEPTION, *COGNITION)}
        # A category without any answer would count as 0 in a sum, so there is no such sum.
        metrics = {name: total(parts) for name, parts in sums.items() if {*parts} <= {*strata}}
        for name in dict.fromkeys(strata):
            inside = [place for place, stratum in enumerate(strata) if stratum == name]
            metrics[name] = Metric([images[i] for i in inside], rows[inside], _category)
        other = [float(mme_label(str(answers[item.id])) == "other") for item in items]
        return metrics | {"undecided": averaged(items, other)}

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right word."""
        return [float(mme_label(str(answers[item.id])) == item.truth) for item in items]

    def remarks(self, said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        """Answers that say neither yes nor no."""
        return undecided([mme_label(each) == "other" for each in said], "for wrong", rank=self.rank)


def _category(sums: np.ndarray) -> np.ndarray:
    return 100 * (ratio(sums[..., 0], sums[..., 1]) + ratio(sums[..., 2], sums[..., 3]))
