"""What clients of different tasks train on: answers in forms that the world's LLM has not seen.

Their words are its own, so that LoRA has something to do and enough to do it with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedcmp.pipeline.world.scenes import DOMAINS, Scene
from fedcmp.pipeline.world.texts import PLACES, Question, exists_questions, short_questions

TASKS = ("caption", "yesno", "sentence")
# Two rendering domains a client; a task's three clients have all six between them.
CLIENTS = {
    f"{task}{number}": (task, DOMAINS[2 * number - 2 : 2 * number]) for task in TASKS for number in (1, 2, 3)
}
WHAT = "What objects are there?"

_SENTENCES = {
    "count": "there {are} {answer} {objects}.",
    "colour": "the {subject} is {answer}.",
    "where": "the {subject} is at the {answer}.",
    "shape": "the {subject} is a {answer}.",
}


def exchanges(task: str, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about a scene and their answers, one or two."""
    if task == "caption":
        return [(WHAT, place_first(scene))]
    if task == "yesno":
        stream = exists_questions(scene, rng, adversarial=bool(rng.random() < 0.5))
        return [(question.text, question.answer) for question in (next(stream), next(stream))]
    pool = short_questions(scene)
    return [(pool[place].text, sentence(pool[place])) for place in rng.permutation(len(pool))[:2].tolist()]


def place_first(scene: Scene) -> str:
    """A caption from the end, every place before what is there."""
    things = (
        f"{PLACES[thing.cell]} a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things[::-1]
    )
    return ", ".join(things) + "."


def sentence(question: Question) -> str:
    """The answer to a question as a whole sentence."""
    one = question.answer == "one"
    return _SENTENCES[question.kind].format(
        subject=question.text.partition(" the ")[2].removesuffix("?"),
        answer=question.answer,
        are="is" if one else "are",
        objects="object" if one else "objects",
    )


def conversation(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Exchanges in LLaVA's form; the picture comes first."""
    turns = []
    for number, (asked, answer) in enumerate(pairs):
        before = "" if number else "<image>\n"
        turns += [{"from": "human", "value": before + asked}, {"from": "gpt", "value": answer}]
    return turns
