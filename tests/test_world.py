"""The embedded default: exact texts, reproducible data, and a frozen LLM that can answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, digest

from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.world import models, train_language, train_vision
from fedcmp.pipeline.world.scenes import COLOURS, DOMAINS, SHAPES, SIZE, SIZES, Content, Scene, Thing, render
from fedcmp.pipeline.world.texts import PLACES, absent_pairs, caption, exists_questions, short_questions
from fedcmp.pipeline.world.write import Amounts, write

WEIGHTS = ROOT / "pipeline/world/weights"


def scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [Content().sample(rng) for _ in range(number)]


THING = re.compile(
    rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})"
)


def parse_things(text: str) -> list[Thing]:
    return [
        Thing(colour, shape, size, PLACES.index(place)) for size, colour, shape, place in THING.findall(text)
    ]


def test_captions_say_just_what_is_there() -> None:
    for scene in scenes(300):
        assert parse_things(caption(scene)) == list(scene.things)


def test_every_word_is_known() -> None:
    tokenizer = models.tokenizer()
    rng = np.random.default_rng(0)
    for scene in scenes(200):
        question = next(exists_questions(scene, rng, adversarial=True))
        texts = [caption(scene), *(f"{q.text} {q.answer}" for q in [question, *short_questions(scene)])]
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("a zebra")["input_ids"]


def test_absent_pairs_are_absent_and_adversarial_ones_share_an_attribute() -> None:
    for scene in scenes(100):
        present = {(thing.colour, thing.shape) for thing in scene.things}
        easy = absent_pairs(scene, adversarial=False)
        hard = absent_pairs(scene, adversarial=True)
        assert {*easy, *hard, *present} == {(c, s) for c in COLOURS for s in SHAPES}
        assert not present & {*easy, *hard}
        assert all(any(c == pc or s == ps for pc, ps in present) for c, s in hard)
        assert not any(c == pc or s == ps for c, s in easy for pc, ps in present)


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_depend_on_scene_and_generator_alone(domain: str) -> None:
    scene = Scene(domain, scenes(1)[0].things)
    pictures = [render(scene, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert pictures[0].shape == (SIZE, SIZE, 3)
    assert pictures[0].dtype == np.uint8
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_the_written_world_is_reproducible_and_read_by_the_ordinary_sources(tmp_path: Path) -> None:
    amounts = Amounts(silo_images=10, heldout_images=8, shard_images=6)
    write(tmp_path / "a", amounts)
    write(tmp_path / "b", amounts)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    for domain in DOMAINS:
        records = list(WebDataset(path=f"{tmp_path}/a/silos/{domain}/*.tar").records())
        assert len(records) == 10
        assert not any(isinstance(record, Skipped) for record in records)
    held_out = tmp_path / "a/heldout"
    records = list(LlavaJson(path=held_out / "captions.json", images=held_out / "images").records())
    assert [record.id for record in records] == [f"{n:06d}.png" for n in range(8)]  # type: ignore[union-attr]
    lines = (tmp_path / "a/benchmarks/pope_adversarial.json").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert labels.count("yes") == labels.count("no") == 8


def test_the_shipped_weights_are_small_ordinary_directories() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
    assert isinstance(AutoModel.from_pretrained(WEIGHTS / "clip"), CLIPVisionModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(WEIGHTS / "llama"), LlamaForCausalLM)
    shipped = AutoTokenizer.from_pretrained(WEIGHTS / "llama")
    assert shipped.get_vocab() == models.tokenizer().get_vocab()
    assert shipped.chat_template == models.CHAT_TEMPLATE


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "word bags"])
def test_the_frozen_llm_answers_yes_and_no(as_text: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "llama")
    accuracy = train_language.answer_accuracy(
        model, tokenizer, np.random.default_rng(77), as_text=as_text, number=1000
    )
    assert accuracy >= 0.95


def test_an_untrained_llm_cannot() -> None:
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    model = models.llama(len(tokenizer), bos=2, eos=3, pad=0)
    accuracy = train_language.answer_accuracy(
        model, tokenizer, np.random.default_rng(77), as_text=True, number=400
    )
    assert accuracy < 0.65


def test_both_recipes_learn_and_repeat() -> None:
    losses: list[list[float]] = [[], []]
    for kept in losses:
        torch.manual_seed(0)
        tokenizer = models.tokenizer()
        model = models.llama(len(tokenizer), bos=2, eos=3, pad=0)
        train_language.train(
            model,
            tokenizer,
            seed=1,
            steps=25,
            batch_size=8,
            report=lambda step, loss, kept=kept: kept.append(loss),
        )
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.7 * losses[0][0]
    torch.manual_seed(0)
    seen: list[float] = []
    accuracy = train_vision.train(
        models.clip_vision(),
        models.image_processor(),
        seed=1,
        steps=12,
        batch_size=8,
        report=lambda step, loss: seen.append(loss),
    )
    assert seen[-1] < 0.9 * seen[0]
    assert set(accuracy) == {"colour", "shape", "size", "cell", "domain"}


def test_pictures_can_be_redrawn_from_features(tmp_path: Path) -> None:
    from fedcmp.commands.world import WEIGHTS
    from fedcmp.pipeline.world.redraw import redraw, save

    originals, results = redraw(WEIGHTS / "clip", pictures=200, held_out=50, steps=30, seed=1)
    assert originals.shape == results[0].pictures.shape == (50, 48, 48, 3)
    assert [result.bytes for result in results] == [36 * 96 * 2, 36 * 96, 9 * 96 * 2, 9 * 96]
    assert all(result.variance > 0.6 for result in results)
    assert results[0].found > 5 / 50
    save(tmp_path / "redrawn.png", originals, results)
    assert (tmp_path / "redrawn.png").stat().st_size > 1000
