"""Captions or reports of pictures in a table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedcmp.evaluate.benchmarks import BENCHMARKS, Item
from fedcmp.evaluate.benchmarks.captions import Captioning
from fedcmp.evaluate.benchmarks.tabular import Asked, Columns, Tabular
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.official.tables import Row, cell, filled, text
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import CAPTION_PROMPT, question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache


class CaptionColumns(Columns):
    """Names of a table's columns; a caption is a text, or a list of several about the picture."""

    caption: str = "caption"


@BENCHMARKS.register("caption_table")
class CaptionTable(Tabular, Captioning):
    """BLEU, ROUGE-L and CIDEr-D as coco-caption has them; rows about one picture are its references.

    Args:
        prompt: What is asked about every picture.
    """

    version = 1

    columns: CaptionColumns = CaptionColumns()
    prompt: str = CAPTION_PROMPT

    @property
    def own_words(self) -> list[str]:
        """Options that change what is said to the LLM, where they are set."""
        return super().own_words + (["prompt"] if self.prompt != CAPTION_PROMPT else [])

    def asked(self, row: Row, place: str) -> Asked:
        """The prompt; the truth has the row's captions."""
        given = cell(row, self.columns.caption, place)
        if isinstance(given, list):
            captions = [text(each) for each in given]
        else:
            captions = [filled(row, self.columns.caption, place)]
        if not captions or not all(captions):
            raise UserError(f"{place}: '{self.columns.caption}' is empty")
        return question(self.prompt), {"captions": captions}, ()

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item a picture, with the captions of all of its rows; groups are those of the first."""
        found = super().items(cache)
        captions: dict[str, list[str]] = {}
        first: dict[str, Item] = {}
        problems: list[Item | Problem] = []
        for each in found:
            if isinstance(each, Problem):
                problems.append(each)
            else:
                captions.setdefault(each.image, []).extend(each.truth["captions"])
                first.setdefault(each.image, each)
        return problems + [
            replace(item, truth=item.truth | {"captions": captions[image]}) for image, item in first.items()
        ]
