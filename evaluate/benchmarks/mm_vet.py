"""MM-Vet: open questions that a judge model grades (Yu et al., 2023; yuweihao/MM-Vet).

The grades come from GPT-4 by the authors' own script; here its input is written and its output read.
A string match in place of the judge would not be MM-Vet, so there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcmp.evaluate.benchmarks import BENCHMARKS, Answers, Benchmark, Item, collect
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.files import Problem, field, read_json_file, string, strings, to_json
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache


@BENCHMARKS.register("mm_vet")
class MmVet(Benchmark):
    """100 x the mean grade: total, every capability, and every combination of capabilities.

    Args:
        path: `mm-vet.json`.
        grades: What the official `mm-vet_evaluator.py` made of `submissions/mm_vet.json`:
            `{id: {"score": [one a run of the judge]}}`.
    """

    version = 1
    headlines = ("total",)

    path: Path
    grades: Path | None = None
    max_new_tokens: int = 512

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Questions as they are, without any instruction."""
        content = read_json_file(self.path, "MM-Vet questions")
        if not isinstance(content, dict):
            raise UserError(f"{self.path}: expected an object of questions by id")

        def make(entry: Any, place: str) -> Item:
            truth = {
                "answer": string(entry, "answer", place),
                "capability": sorted(strings(entry, "capability", place)),
            }
            text = question(string(entry, "question", place))
            name = place.removeprefix(f"{self.path}: ")
            return Item(name, string(entry, "imagename", place), text, truth)

        return collect(((f"{self.path}: {name}", entry) for name, entry in content.items()), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Nothing without grades."""
        if self.grades is None:
            return {}
        graded, place = read_json_file(self.grades, "MM-Vet grades"), str(self.grades)
        runs = [field(field(graded, item.id, place), "score", f"{place}: {item.id}") for item in items]
        if len({len(each) for each in runs}) != 1 or not runs[0]:
            raise UserError(f"{place}: not as many grades for every question; let the judge finish")
        # One row a question: its grade in every run, and one.
        rows = np.array([[*map(float, each), 1.0] for each in runs])
        capabilities = [item.truth["capability"] for item in items]
        images = [item.image for item in items]

        def metric(inside: list[int], value: Callable[[np.ndarray], np.ndarray] = _mean) -> Metric:
            return Metric([images[i] for i in inside], rows[inside], value)

        everything = list(range(len(items)))
        metrics = {"total": metric(everything), "spread over judge runs": metric(everything, _spread)}
        for name in sorted({each for several in capabilities for each in several}):
            inside = [place for place, several in enumerate(capabilities) if name in several]
            metrics[f"capability {name}"] = metric(inside)
        for together in sorted({tuple(several) for several in capabilities}):
            inside = [place for place, several in enumerate(capabilities) if tuple(several) == together]
            metrics[f"integration {'_'.join(together)}"] = metric(inside)
        return metrics

    def evidence(self) -> Any:
        """The judge's grades."""
        return None if self.grades is None else read_json_file(self.grades, "MM-Vet grades")

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """What the official evaluator grades."""
        return {"mm_vet.json": to_json({item.id: str(answers[item.id]) for item in items})}

    def show_reference(self, item: Item) -> str:
        """The expected answer."""
        return str(item.truth["answer"])


def _runs(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., :-1] / np.maximum(sums[..., -1:], 1)


def _mean(sums: np.ndarray) -> np.ndarray:
    return _runs(sums).mean(-1)


def _spread(sums: np.ndarray) -> np.ndarray:
    return _runs(sums).std(-1)
