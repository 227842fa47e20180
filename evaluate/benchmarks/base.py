"""What a benchmark is: official files in, items to answer, scores and submission files out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fedcmp.evaluate.metric import Metric, mean
from fedcmp.evaluate.official.files import Problem, attempt
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.records import Text, Turn
from fedcmp.pipeline.registry import Registry

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache  # `fedcmp benchmarks` lists without it

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Item:
    """One thing to answer.

    `text` ends with the user's turn, or with the reference whose likelihood is asked for; `options`
    are the answers to rank where a benchmark ranks. `truth` is what the files say is right, as JSON has it:
    a word, captions, or a mapping with all that scores need; None where they do not say.
    """

    id: str
    image: str
    text: Text
    truth: Any = field(default="", hash=False)
    options: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the text."""
        return hashlib.sha256(f"{self.text.kind}\n".encode() + self.text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """The truth as what is saved has it in its hashes: a word as it is, all else as JSON."""
        return self.truth if isinstance(self.truth, str) else json.dumps(self.truth)


class AskedItem(Item):
    """An item that was asked before, of whose text only the hash is at hand."""

    def __init__(self, id: str, image: str, digest: str) -> None:
        super().__init__(id, image, Text(()), digest)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the text that was asked."""
        return self.label


Answer = str | list[float]
Answers = Mapping[str, Answer]
Asks = Literal["caption", "question"]
Mode = Literal["generate", "rank", "weigh", "likelihood", "retrieve"]
# Options that decide answers, so that the answers' keys hold them, and scores do not once more.
OF_THE_ANSWERS = ("max_new_tokens", "prompt_suffix", "system_prompt", "stop")


class Benchmark(Options, ABC):
    """A benchmark's options and rules; `version` changes whenever its scores do.

    `asks` selects the template, and `headlines` are the metrics that a summary shows. `asks_cache` says
    that questions are texts of the cache.

    Args:
        silo: Silo that holds the images; by default the benchmark's own name where there is such a cache.
        images: Folder of the images, for extracting and showing them.
        max_new_tokens: Tokens an answer may have.
        prompt_suffix: Ends every prompt in place of the usual instruction, such as "Answer the question
            using a single word or phrase."; with its own line break.
        system_prompt: In place of the prompt template's own.
        stop: Texts that end an answer and are no part of it.
        silos: Those whose own projectors are judged, where a run has such; all by default.
    """

    version: ClassVar[int]
    asks: ClassVar[Asks] = "question"
    asks_cache: ClassVar[bool] = False
    headlines: ClassVar[tuple[str, ...]]

    silo: str | None = None
    images: Path | None = None
    max_new_tokens: int = Field(32, ge=1)
    prompt_suffix: str | None = None
    system_prompt: str | None = Field(None, min_length=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    silos: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _no_word_is_lost(self) -> Benchmark:
        if self.own_words and self.mode in ("likelihood", "retrieve"):
            raise ValueError(f"{self.own_words[0]} has no effect, as no question is asked; remove it")
        if self.stop and self.mode != "generate":
            raise ValueError("stop has no effect, as no text is generated; remove it")
        return self

    @property
    def mode(self) -> Mode:
        """How answers come about.

        `generate` writes text, `rank` takes the likeliest of the item's options, `weigh` measures all of
        them, `likelihood` measures the item's own text, `retrieve` matches all images with all references.
        """
        return "generate"

    @property
    def own_words(self) -> list[str]:
        """Options that change what is said to the LLM, where they are set."""
        return [name for name in ("prompt_suffix", "system_prompt") if getattr(self, name) is not None]

    @property
    def wording(self) -> dict[str, str]:
        """What is asked otherwise than usually; a score must not be quoted without it, either."""
        words = {name: repr(getattr(self, name)) for name in self.own_words}
        return words | ({"stop": ", ".join(map(repr, self.stop))} if self.stop else {})

    @property
    def settings(self) -> dict[str, str]:
        """What a score must not be quoted without."""
        return {}

    def better(self, metric: str) -> Literal["higher", "lower"] | None:
        """Which values of a metric are better; None where neither are."""
        return "higher"

    @abstractmethod
    def items(self, cache: FeatureCache | None) -> list[Item | Problem]:
        """Everything to answer, in the order of the files.

        Args:
            cache: Features of the images; None where only the images' names are wanted.

        Raises:
            UserError: A file is missing or not in the official format.
        """

    def worded(self, item: Item) -> Item:
        """An item in this configuration's own words, where it has any."""
        turns = list(item.text.turns)
        if self.prompt_suffix is not None:
            asked = turns[-1].content.removesuffix(SHORT_ANSWER).removesuffix(LETTER)
            turns[-1] = Turn("user", asked + self.prompt_suffix)
        if self.system_prompt is not None:
            turns.insert(0, Turn("system", self.system_prompt))
        return replace(item, text=Text(tuple(turns))) if self.own_words else item

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Answers) -> dict[str, Metric]:
        """Metrics of answered items; none where the files hold no references."""

    def points(self, items: Sequence[Item], answers: Answers) -> list[float] | None:
        """What each answer is worth in [0, 1]; None where answers are not right or wrong."""
        return None

    def submissions(self, items: Sequence[Item], answers: Answers) -> dict[str, bytes]:
        """Files for the official evaluation, by name."""
        return {}

    def evidence(self) -> Any:
        """What scores depend on besides options, references and answers, as JSON."""
        return None

    def remarks(self, said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        """What scores do not show about answers in words: counts, and a warning where there is cause."""
        return {}, None

    def unpack(self, folder: Path) -> None:
        """Write images that are inside the benchmark's own files."""

    def show_reference(self, item: Item) -> str:
        """The reference as a person reads it; also an answer that scores well."""
        return item.label

    def show_answer(self, item: Item, answer: Answer) -> str:
        """An answer as a person reads it."""
        return str(answer)


class Choice(Benchmark, ABC):
    """A benchmark whose answers are one of a few words or letters.

    Args:
        rank: Take the likeliest option instead of generating.
    """

    rank: bool = False

    @property
    def mode(self) -> Mode:
        """`rank` if asked for."""
        return "rank" if self.rank else "generate"

    @property
    def settings(self) -> dict[str, str]:
        """Ranked answers are not what the official rule scores."""
        return {"answers": "likeliest option"} if self.rank else {}


def undecided(flags: Sequence[bool], taken: str, *, rank: bool) -> tuple[dict[str, int], str | None]:
    """Remarks on yes/no answers that are neither, which the rule takes for something all the same."""
    number = sum(flags)
    if rank or not number:
        return {}, None
    return {"undecided answers": number}, (
        f"answers that say neither yes nor no are taken {taken}; 'rank = true' chooses the likelier word"
    )


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "fedcmp.evaluate.benchmarks")


def collect(
    listed: Iterable[tuple[str, Any]], make: Callable[[Any, str], Item | None]
) -> list[Item | Problem]:
    """Turn entries into items; one that does not fit becomes a problem and stops no other.

    Args:
        listed: Entries with their places.
        make: Makes the item of an entry and its place; None leaves it out; raises what it finds wrong.
    """

    def encodable(entry: Any, place: str) -> Item | None:
        item = make(entry, place)
        if item is not None:
            image = PurePath(item.image)
            if image.is_absolute() or ".." in image.parts:
                raise UserError(f"{place}: image '{item.image}' is outside of the folder of images")
            f"{item.id}{item.image}{item.label}".encode()
            item.text.encode()
        return item

    made = (attempt(encodable, entry, place) for place, entry in listed)
    return [each for each in made if each is not None]


def annotators(answers: list[str], place: str) -> list[str]:
    """The answers of people to one question, of whom leave-one-out accuracy wants at least four.

    Raises:
        UserError: They are fewer, so that even the right answer would not get full marks.
    """
    if len(answers) < 4:
        raise UserError(
            f"{place}: {len(answers)} answers instead of ten; this benchmark's rule compares an answer with "
            "three others, so the right one would not count as 1; use name = 'gqa' (exact match) for data "
            "with one answer a question"
        )
    return answers


def choices_prompt(hint: str, asked: str, choices: Mapping[str, str]) -> str:
    """A question with its options as VLMEvalKit asks LLaVA."""
    lines = [*([hint] if hint else []), asked, *(f"{letter}. {said}" for letter, said in choices.items())]
    return "\n".join(lines) + LETTER


def averaged(items: Sequence[Item], values: Sequence[float], images: Sequence[str] | None = None) -> Metric:
    """The mean of one value an item; `images` are resampled together, by default the items' own."""
    statistics = np.array([[value, 1.0] for value in values]).reshape(-1, 2)
    return Metric(list(images) if images is not None else [item.image for item in items], statistics, mean)


def averaged_by(
    name: str, items: Sequence[Item], values: Sequence[float], groups: Sequence[str]
) -> dict[str, Metric]:
    """The mean of every group, as `name group`."""
    metrics = {}
    for group in sorted(set(groups)):
        inside = [place for place, each in enumerate(groups) if each == group]
        metrics[f"{name} {group}"] = averaged([items[i] for i in inside], [values[i] for i in inside])
    return metrics
