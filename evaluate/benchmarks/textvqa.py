"""TextVQA: questions about words in pictures (Singh et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.evaluate.benchmarks import (
    BENCHMARKS,
    SHORT_ANSWER,
    Answers,
    Benchmark,
    Item,
    Metric,
    Problem,
    UserError,
    annotators,
    attempt,
    averaged,
    collect,
    entries,
    field,
    file_name,
    json_lines,
    question,
    string,
    strings,
)
from fedcmp.evaluate.official.short_answers import textvqa_accuracy

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

_OCR = "Reference OCR token: "


@BENCHMARKS.register("textvqa")
class TextVqa(Benchmark):
    """Leave-one-out accuracy after the EvalAI normaliser.

    Whether the prompt lists the words an OCR system found moves the score by about 12 points, so it is
    recorded beside it.

    Args:
        annotations: `TextVQA_0.5.1_val.json`.
        questions: LLaVA's `llava_textvqa_val_v051_ocr.jsonl`, whose prompts are used as they are.
        ocr: `TextVQA_Rosetta_OCR_v0.2_val.json`, whose words are put into the prompt.
        image_name: How an image id becomes the file name that the cache knows.
    """

    version = 1
    headlines = ("accuracy",)

    annotations: Path
    questions: Path | None = None
    ocr: Path | None = None
    image_name: str = "{image_id}.jpg"

    @property
    def settings(self) -> dict[str, str]:
        """Where OCR words in the prompt came from."""
        if self.questions is not None:
            return {"OCR": f"as in {self.questions.name}"}
        return {"OCR": self.ocr.name if self.ocr else "none"}

    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """One item an annotation; LLaVA's prompts are joined by image and lower-cased question."""
        prompts: dict[tuple[str, str], str] = {}
        words: dict[str, list[str]] = {}
        found: list[Any] = []
        if self.questions is not None:
            lines = json_lines(self.questions, "TextVQA questions")
            found = [attempt(_prompt, entry, place) for place, entry in lines]
            prompts = dict(each for each in found if not isinstance(each, Problem))
        elif self.ocr is not None:
            lines = entries(self.ocr, "TextVQA OCR", "data")
            found = [attempt(_words, entry, place) for place, entry in lines]
            words = dict(each for each in found if not isinstance(each, Problem))
        problems: list[Item | Problem] = [each for each in found if isinstance(each, Problem)]

        def make(entry: Any, place: str) -> Item:
            image, asked = str(field(entry, "image_id", place)), string(entry, "question", place)
            if self.questions is not None:
                prompt = prompts.get((image, asked.lower()))
                if prompt is None:
                    raise UserError(f"{self.questions}: no prompt for {asked!r} about image {image}")
            else:
                ocr = f"\n{_OCR}{', '.join(words[image])}" if words.get(image) else ""
                prompt = asked + ocr + SHORT_ANSWER
            return Item(
                str(field(entry, "question_id", place)),
                file_name(self.image_name, image),
                question(prompt),
                annotators(strings(entry, "answers", place), place),
            )

        return problems + collect(entries(self.annotations, "TextVQA annotations", "data"), make)

    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """The mean over all questions."""
        return {"accuracy": averaged(items, self.points(items, answers))}

    def points(self, items: Sequence[Item], answers: Answers) -> list[float]:
        """Leave-one-out accuracy of each answer."""
        return [textvqa_accuracy(str(answers[item.id]), item.truth) for item in items]

    def show_reference(self, item: Item) -> str:
        """The annotators' most frequent answer."""
        answers = item.truth
        return str(max(answers, key=answers.count))


def _prompt(entry: Any, place: str) -> tuple[tuple[str, str], str]:
    text = string(entry, "text", place)
    return (str(field(entry, "question_id", place)), _asked(text, place)), text


def _words(entry: Any, place: str) -> tuple[str, list[str]]:
    found = field(entry, "ocr_tokens", place)
    return str(field(entry, "image_id", place)), [str(word) for word in found]


def _asked(prompt: str, place: str) -> str:
    """The lower-cased question within LLaVA's prompt, as its eval_textvqa.py finds it."""
    lines = prompt.split("\n")
    if _OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR.strip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"{place}: the prompt has {len(lines)} lines; is this LLaVA's question file?")
