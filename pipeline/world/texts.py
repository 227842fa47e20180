"""What is said about a scene: captions, questions with exact answers, and the word list.

Questions carry the official prompts of the benchmarks whose form they take (POPE, VQA), so the
frozen language model meets at evaluation the very wording a real one would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedcmp.pipeline.world.scenes import COLOURS, DOMAINS, SHAPES, SIZES, Scene, Thing

SHORT_ANSWER = "Answer the question using a single word or phrase."
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "middle centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
COUNTS = ("one", "two", "three")

_STYLES = {
    "flat": "{things}.",
    "outline": "an outline drawing of {things}.",
    "dark": "in the dark there is {things}.",
    "photo": "a photo with {things}.",
    "sketch": "sketch: {things}.",
    "pixel": "{count} pixel {noun}: {things}.",
}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its kind (`exists`, `colour`, `shape`, `where`, `count`)."""

    text: str
    answer: str
    kind: str


def describe(thing: Thing) -> str:
    """Name a thing by size, colour, shape and place."""
    return f"a {thing.size} {thing.colour} {thing.shape} at the {PLACES[thing.cell]}"


def caption(scene: Scene) -> str:
    """The caption of a scene in the style of its domain, things in reading order."""
    return _STYLES[scene.domain].format(
        things=", ".join(map(describe, scene.things)),
        count=COUNTS[len(scene.things) - 1],
        noun="object" if len(scene.things) == 1 else "objects",
    )


def exists(colour: str, shape: str) -> str:
    """The POPE question for an object."""
    article = "an" if colour == "orange" else "a"
    return f"Is there {article} {colour} {shape} in the image?"


def absent_pairs(scene: Scene, *, adversarial: bool) -> list[tuple[str, str]]:
    """Colour-shape pairs that are not in the scene; adversarial ones share one attribute."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    colours = {colour for colour, _ in present}
    shapes = {shape for _, shape in present}
    return [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in present and (colour in colours or shape in shapes) == adversarial
    ]


def exists_questions(scene: Scene, rng: np.random.Generator, *, adversarial: bool) -> Iterator[Question]:
    """Yes/no questions without end, half of them yes."""
    present = [(thing.colour, thing.shape) for thing in scene.things]
    absent = absent_pairs(scene, adversarial=adversarial)
    while True:
        yes = rng.random() < 0.5
        pairs = present if yes else absent
        yield Question(exists(*pairs[rng.integers(len(pairs))]), "yes" if yes else "no", "exists")


def short_questions(scene: Scene) -> list[Question]:
    """Every question whose answer is a word or two and is unique in the scene."""
    number = len(scene.things)
    questions = [Question("How many objects are there?", COUNTS[number - 1], "count")]
    for thing in scene.things:
        same_shape = [other for other in scene.things if other.shape == thing.shape]
        same_colour = [other for other in scene.things if other.colour == thing.colour]
        if len(same_shape) == 1:
            questions.append(Question(f"What color is the {thing.shape}?", thing.colour, "colour"))
            questions.append(Question(f"Where is the {thing.shape}?", PLACES[thing.cell], "where"))
        if len(same_colour) == 1:
            questions.append(Question(f"What shape is the {thing.colour} object?", thing.shape, "shape"))
    return questions


def vocabulary() -> list[str]:
    """Every word and punctuation mark the world's texts use, lower-case, sorted."""
    texts = [*COLOURS, *SHAPES, *SIZES, *PLACES, *COUNTS, *DOMAINS, "yes no an", ",", "\n"]
    texts += [style.format(things="", count="", noun="object objects") for style in _STYLES.values()]
    texts += [describe(Thing("red", "circle", "small", 0)), exists("red", "circle")]
    texts += [
        question.text for question in short_questions(Scene("flat", (Thing("red", "circle", "small", 0),)))
    ]
    return sorted({word for text in texts for word in split_words(text.lower())})


def split_words(text: str) -> list[str]:
    """Split text as the world's tokenizer does: words, single punctuation marks, newlines."""
    return re.findall(WORD_PATTERN, text)


WORD_PATTERN = r"\n|\w+|[^\w\s]"
