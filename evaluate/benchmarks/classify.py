"""Pictures with a class each in a table, told by which class's name the LLM finds likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.evaluate.benchmarks import BENCHMARKS, SHORT_ANSWER, Answer, Answers, Item, Mode, averaged
from fedcmp.evaluate.benchmarks.tabular import Asked, Columns, Judged
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.classification import (
    auroc_parts,
    confusion,
    macro_auroc,
    macro_f1,
    one_against_rest,
)
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.official.tables import Row, filled
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_MOST = 1000


class ClassColumns(Columns):
    """Names of a table's columns; a label is a class, or its number from 0 in `classes`."""

    label: str = "label"


@BENCHMARKS.register("classify")
class Classify(Judged):
    """Accuracy, macro F1, and the mean over classes of the AUROC of one against the rest.

    Args:
        classes: The classes, or a table from labels to the words that stand for them; by default the labels
            that are there, in the order of the alphabet.
        prompt: What is asked about every picture.
        per_byte: Divide each log-likelihood by the bytes of the class's name, as lm-evaluation-harness does
            for `acc_norm`: long names are not at a disadvantage then.
    """

    version = 1
    headlines = ("accuracy", "macro F1", "AUROC")

    columns: ClassColumns = ClassColumns()
    classes: dict[str, str] | tuple[str, ...] | None = None
    prompt: str = "What does the image show?"
    per_byte: bool = False

    @property
    def mode(self) -> Mode:
        """The likelihood of every class's name."""
        return "weigh"

    @property
    def settings(self) -> dict[str, str]:
        """How long names are treated."""
        return {"likelihood": "per byte"} if self.per_byte else {}

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item a row, all with the same classes to weigh."""
        found = super().items(cache)
        labels = {each.truth["label"] for each in found if isinstance(each, Item)}
        names = tuple(self._names.values()) or tuple(sorted(labels))
        if labels and not 2 <= len(names) <= _MOST:
            raise UserError(
                f"{self.path}: {len(names)} classes instead of 2 to {_MOST}; name them in 'classes'"
            )
        return [replace(each, options=names) if isinstance(each, Item) else each for each in found]

    @property
    def _names(self) -> Mapping[str, str]:
        """Words by label, where they are given."""
        given = self.classes or {}
        return given if isinstance(given, dict) else {name: name for name in given}

    def asked(self, row: Row, place: str) -> Asked:
        """The prompt with LLaVA's instruction for short answers."""
        label = filled(row, self.columns.label, place)
        names = self._names
        if names and label not in names and label.isdecimal() and int(label) < len(names):
            label = list(names)[int(label)]
        if names and label not in names:
            raise UserError(f"{place}: label {label!r} is none of the classes{did_you_mean(label, names)}")
        if not names and label.isdecimal():
            raise UserError(f"{place}: label {label} is a number; give the names of the classes in 'classes'")
        return question(self.prompt + SHORT_ANSWER), {"label": names.get(label, label)}, ()

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Answers are summed negative log-likelihoods of the classes' names."""
        classes = items[0].options
        images = [item.image for item in items]
        likelihoods = np.array([self._likelihoods(item, answers[item.id]) for item in items])
        true = np.array([classes.index(item.truth["label"]) for item in items])
        points = (likelihoods.argmax(1) == true).astype(float).tolist()
        metrics = {
            "accuracy": averaged(items, points),
            "macro F1": Metric(images, confusion(likelihoods.argmax(1), true, len(classes)), macro_f1),
        }
        if len({*true.tolist()}) > 1:
            parts = auroc_parts(one_against_rest(likelihoods), true)
            metrics["AUROC"] = Metric(images, parts, macro_auroc, divisible=False)
        return metrics | self.by_group(items, points) | self.all_right(items, points)

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """1 for the right class."""
        said = [self.show_answer(item, answers[item.id]) for item in items]
        return [float(each == item.truth["label"]) for each, item in zip(said, items, strict=True)]

    def _likelihoods(self, item: Item, answer: Answer) -> list[float]:
        losses = [float(loss) for loss in answer]
        lengths = [len(name.encode()) if self.per_byte else 1 for name in item.options]
        return [-loss / length for loss, length in zip(losses, lengths, strict=True)]

    def show_answer(self, item: Item, answer: Answer) -> str:
        """The likeliest class; of equals the first."""
        likelihoods = self._likelihoods(item, answer)
        return item.options[likelihoods.index(max(likelihoods))]

    def show_reference(self, item: Item) -> str:
        """The class."""
        return str(item.truth["label"])
