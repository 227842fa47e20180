"""Preferences of the embedded default: a run's own answers about new scenes, ranked by what the scenes are.

<out>/silos/<silo>.json, <silo>/     pictures of a silo's domain with what it prefers
<out>/public/<kind>.json, <kind>/    prompts with the true answers, and a few preferences
<out>/manifest.json                  written last
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedcmp.evaluate.trained import trained_run
from fedcmp.extract.encoders.base import ENCODERS, LoadedEncoder
from fedcmp.federate.preference.candidates import Asking
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic, write_json
from fedcmp.pipeline.identity import language_options
from fedcmp.pipeline.manifest import withdraw_manifest, write_manifest
from fedcmp.pipeline.models.decoding import drawn
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.models.language import load_language
from fedcmp.pipeline.models.projector import content_hash
from fedcmp.pipeline.models.prompts import stop_string
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.records import Text, Turn
from fedcmp.pipeline.world.scenes import DOMAINS, Content, Scene, render
from fedcmp.pipeline.world.texts import SHORT_ANSWER, caption, exists_questions, short_questions

KINDS = ("caption", "yesno", "short")

_THING = re.compile(r"a \w+ \w+ \w+ at the \w+ \w+")
_AT_ONCE = 128
_MOST_SCENES = 40


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is written of each kind: preferences of a silo; prompts and preferences that are public."""

    seed: int = 0
    silo_preferences: int = 240
    prompts: int = 600
    public_preferences: int = 200
    max_new_tokens: int = 48


@dataclass(frozen=True)
class _Asked:
    """A question about a picture `(48, 48, 3)` uint8."""

    picture: np.ndarray
    text: Text
    answer: str


def prefer(
    experiment: Experiment,
    out: Path,
    amounts: Amounts,
    advance: Callable[[int], None] = lambda preferences: None,
) -> dict[str, int]:
    """Write preferences between answers of a finished run.

    Args:
        experiment: The run's.
        out: Where to.
        amounts: How much.
        advance: Called with the number of preferences found.

    Returns:
        Preferences written, by silo or kind.

    Raises:
        UserError: The run is not finished, or hardly ever answers in two ways.
    """
    run = trained_run(experiment)
    if run.adapters:
        raise UserError(f"{run.path}: it tuned the LLM, too, which is no reference here; give another run")
    withdraw_manifest(out)
    device = pick_device(experiment.device)
    encoder = ENCODERS.build(experiment.extract.encoder, "extract.encoder").load(device, "float32")
    language = load_language(experiment.language.path, **language_options(experiment))
    model = VisionLanguage(run.projector().to(device), language)
    asking = Asking.of(experiment, language, model.projector.tokens(run.manifest["features"]["patches"]))
    respond = _Responding(encoder, model, asking, amounts.max_new_tokens)
    counts = {}
    for number, domain in enumerate(DOMAINS):
        rng = np.random.default_rng([amounts.seed, 77, number])
        content = Content(domain=[float(name == domain) for name in DOMAINS])
        preferred = [
            pair
            for kind in KINDS
            for pair in respond.preferred(kind, content, amounts.silo_preferences, rng, advance)
        ]
        counts[domain] = _write(out / "silos", domain, preferred)
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([amounts.seed, 78, number])
        preferred = respond.preferred(kind, Content(), amounts.public_preferences, rng, advance)
        asked = [_ask(kind, Content().sample(rng), rng) for _ in range(amounts.prompts)]
        counts[kind] = _write(out / "public", kind, preferred, asked)
    write_manifest(out, asdict(amounts) | {"run": content_hash(model.projector.state_dict())})
    return counts


def agreement(kind: str, said: str, wanted: str) -> float:
    """How right an answer is, 0 to 1: F1 of things described with their places, or equality."""
    if kind != "caption":
        return float(said.strip().rstrip(".").lower() == wanted)
    one, other = (Counter(_THING.findall(text)) for text in (said, wanted))
    return 2 * (one & other).total() / max(one.total() + other.total(), 1)


@dataclass(frozen=True)
class _Responding:
    """A run that answers in two ways."""

    encoder: LoadedEncoder
    model: VisionLanguage
    asking: Asking
    length: int

    def preferred(
        self,
        kind: str,
        content: Content,
        number: int,
        rng: np.random.Generator,
        advance: Callable[[int], None],
    ) -> list[tuple[_Asked, str, str]]:
        """So many questions with a better and a worse answer."""
        found: list[tuple[_Asked, str, str]] = []
        for _ in range(_MOST_SCENES * max(number // _AT_ONCE, 1)):
            asked = [_ask(kind, content.sample(rng), rng) for _ in range(_AT_ONCE)]
            for each, answers in zip(asked, self._answers(asked, rng), strict=True):
                pair = ranked(kind, each.answer, *answers)
                if pair is not None and len(found) < number:
                    found.append((each, *pair))
                    advance(1)
            if len(found) >= number:
                return found
        raise UserError(
            f"the run's answers of kind '{kind}' are almost always right: {len(found)} of {number} pairs "
            "found; ask for fewer, or take a run of fewer rounds"
        )

    @torch.inference_mode()
    def _answers(self, asked: list[_Asked], rng: np.random.Generator) -> list[tuple[str, str]]:
        pixels = [self.encoder.preprocess(Image.fromarray(each.picture)) for each in asked]
        features = self.encoder.encode(torch.from_numpy(np.stack(pixels))).float()
        texts = [each.text for each in asked]
        answers = drawn(
            self.model.language,
            self.asking.prompts(texts),
            self.model.visual(features),
            range(len(asked)),
            copies=2,
            length=self.length,
            ends=self.asking.ends(texts[0]),
            temperature=1.0,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        )
        said = self.model.language.said(answers, stop_string(self.asking.template_of(texts[0])))
        return list(zip(said[::2], said[1::2], strict=True))


def ranked(kind: str, truth: str, one: str, other: str) -> tuple[str, str] | None:
    """The better answer and the worse one; two that are equally wrong are worse than the truth."""
    first, second = (agreement(kind, said, truth) for said in (one, other))
    if first == second:
        return None if first == 1 or not one else (truth, one)
    better, worse = (one, other) if first > second else (other, one)
    return (better, worse) if worse else None


def _ask(kind: str, scene: Scene, rng: np.random.Generator) -> _Asked:
    """A question of a kind about a scene, in the words of the benchmarks."""
    picture = render(scene, rng)
    if kind == "caption":
        answer = caption(scene)
        return _Asked(picture, Text((Turn("assistant", answer),)), answer)
    if kind == "yesno":
        question = next(exists_questions(scene, rng, adversarial=bool(rng.random() < 0.5)))
    else:
        pool = short_questions(scene)
        question = pool[int(rng.integers(len(pool)))]
    turns = (Turn("user", f"<image>\n{question.text}\n{SHORT_ANSWER}"), Turn("assistant", question.answer))
    return _Asked(picture, Text(turns), question.answer)


def _write(
    folder: Path, name: str, preferred: list[tuple[_Asked, str, str]], asked: list[_Asked] | None = None
) -> int:
    entries = [
        {"chosen": better, "rejected": worse, **_as_entry(each, answered=False)}
        for each, better, worse in preferred
    ]
    entries += [_as_entry(each, answered=True) for each in asked or []]
    pictures = [each.picture for each, _, _ in preferred] + [each.picture for each in asked or []]
    for number, (entry, picture) in enumerate(zip(entries, pictures, strict=True)):
        entry["image"] = f"{number:06d}.png"
        write_atomic(folder / name / entry["image"], _png(picture))
    write_json(folder / f"{name}.json", entries)
    return len(preferred)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def _as_entry(asked: _Asked, *, answered: bool) -> dict[str, Any]:
    """As LLaVA has it; a caption answers nothing."""
    if len(asked.text.turns) == 1:
        return {"caption": asked.answer} if answered else {}
    turns = [{"from": "human", "value": asked.text.turns[0].content}]
    return {"conversations": [*turns, *([{"from": "gpt", "value": asked.answer}] if answered else [])]}
