"""Train the frozen language model of the embedded default on the world's texts alone.

No picture is seen. What later lets a projector speak to it: in most documents the context is nine
soft tokens, each the sum of the word embeddings of one grid cell, perturbed in scale and by noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.pipeline.world.scenes import COLOURS, GRID, SHAPES, Content, Scene
from fedcmp.pipeline.world.texts import (
    PLACES,
    SHORT_ANSWER,
    Question,
    caption,
    exists_questions,
    short_questions,
    split_words,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CELLS = GRID * GRID


@dataclass
class Document:
    """Token ids, which of them are predicted, and the bags of words standing for the image."""

    ids: list[int]
    supervised: list[bool]
    bags: list[list[tuple[int, float]]] | None


class Writer:
    """Write training documents as token ids; word look-ups are cached for speed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.words: dict[str, int] = tokenizer.get_vocab()
        self.bos, self.eos = self.words["<s>"], self.words["</s>"]
        self.newline, self.short = self.words["\n"], self.words[SHORT_ANSWER]
        self._phrases: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Token ids of a phrase."""
        if text not in self._phrases:
            self._phrases[text] = [self.words[word] for word in split_words(text.lower())]
        return self._phrases[text]

    def bags(self, scene: Scene, rng: np.random.Generator) -> list[list[tuple[int, float]]]:
        """Weighted words of every grid cell: the thing in it, its place, the picture's domain."""
        domain, everywhere = self.words[scene.domain], rng.random() < 0.5
        bags: list[list[tuple[int, float]]] = [[] for _ in range(CELLS)]
        for thing in scene.things:
            for word in (thing.size, thing.colour, thing.shape, *PLACES[thing.cell].split()):
                bags[thing.cell].append((self.words[word], rng.uniform(0.5, 1.5)))
        for cell in range(CELLS):
            if everywhere or rng.random() < 0.4:
                bags[cell].append((domain, rng.uniform(0.4, 1.4)))
        return bags

    def caption(self, scene: Scene, rng: np.random.Generator) -> Document:
        """LLaVA's plain form: BOS, image, caption, newline."""
        text = [*self.tokens(caption(scene)), self.newline]
        ids = [self.bos, *[self.words["<image>"]] * CELLS, *text]
        return Document(ids, [False] * (1 + CELLS) + [True] * len(text), self.bags(scene, rng))

    def questions(self, scene: Scene, rng: np.random.Generator, *, as_text: bool) -> Document:
        """Image (or its caption as plain text), newline, then questions and supervised answers."""
        context = self.tokens(caption(scene)) if as_text else [self.words["<image>"]] * CELLS
        ids = [self.bos, *context, self.newline]
        supervised = [False] * len(ids)
        if rng.random() < 0.5:
            items = self._checklist(scene, rng)
        else:
            items = self._interview(scene, rng)
        for question, answer in items:
            ids += [*question, *answer, self.eos]
            supervised += [False] * len(question) + [True] * (len(answer) + 1)
        return Document(ids, supervised, None if as_text else self.bags(scene, rng))

    def _interview(self, scene: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        short = short_questions(scene)
        sources: list[Callable[[], Question]] = [
            exists_questions(scene, rng, adversarial=False).__next__,
            exists_questions(scene, rng, adversarial=True).__next__,
            lambda: short[rng.integers(len(short))],
        ]
        items = []
        for _ in range(5):
            question = sources[rng.integers(3)]()
            prompt = self.tokens(question.text)
            if rng.random() < 0.5:
                prompt = [*prompt, self.newline, self.short]
            items.append((prompt, self.tokens(question.answer)))
        return items

    def _checklist(self, scene: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        easy = exists_questions(scene, rng, adversarial=False)
        hard = exists_questions(scene, rng, adversarial=True)
        items = []
        for _ in range(12):
            if rng.random() < 0.2:
                seen = {word for thing in scene.things for word in (thing.colour, thing.shape)}
                unseen = [word for word in (*COLOURS, *SHAPES) if word not in seen]
                yes = rng.random() < 0.5
                pool = sorted(seen) if yes else unseen
                items.append(
                    (self.tokens(f"{pool[rng.integers(len(pool))]}?"), self.tokens("yes" if yes else "no"))
                )
                continue
            question = next(easy if rng.random() < 0.4 else hard)
            pair = question.text.split(maxsplit=3)[3].removesuffix(" in the image?")
            items.append((self.tokens(f"{pair}?"), self.tokens(question.answer)))
        return items


def batch(
    documents: list[Document], *, vocab_size: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad documents on the right.

    Returns:
        ids `(batch, length)`, supervised `(batch, length)` bool, bag weights
        `(batch, cells, vocab)` and which rows have bags `(batch,)` bool.
    """
    import torch

    length = max(len(document.ids) for document in documents)
    ids = np.full((len(documents), length), pad, np.int64)
    supervised = np.zeros((len(documents), length), bool)
    weights = np.zeros((len(documents), CELLS, vocab_size), np.float32)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = document.ids
        supervised[row, : len(document.ids)] = document.supervised
        for cell, bag in enumerate(document.bags or []):
            for word, weight in bag:
                weights[row, cell, word] += weight
    soft = np.array([document.bags is not None for document in documents])
    return (
        torch.from_numpy(ids),
        torch.from_numpy(supervised),
        torch.from_numpy(weights),
        torch.from_numpy(soft),
    )


def embed(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    weights: torch.Tensor,
    soft: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Input embeddings with the image positions replaced by perturbed bags of words."""
    table = model.model.embed_tokens.weight
    embeds = model.model.embed_tokens(ids)
    if soft.any():
        embeds = embeds.clone()
        embeds[soft, 1 : 1 + CELLS] = perturb(weights[soft] @ table, generator)
    return embeds


def perturb(bags: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distort soft tokens in the ways in which projected patch features differ from words.

    Each picture gets its own amounts of leakage from other cells, a random linear distortion, a
    common offset, a scale and noise. The LLM that reads through these also reads a projector it
    has never met.

    Args:
        bags: `(batch, cells, width)`.
        generator: Source of the distortions.
    """
    import torch

    batch, cells, width = bags.shape

    def amount(most: float) -> torch.Tensor:
        return most * torch.rand(batch, 1, 1, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    leak = torch.softmax(2 * normal(batch, cells, cells), -1)
    bags = bags + amount(0.25) * (leak @ bags)
    distortion = normal(width, width) / width**0.5
    bags = bags + amount(0.6) * (bags @ distortion)
    bags = bags * (0.6 + amount(0.9)) + amount(0.8) * normal(batch, 1, width)
    return bags + amount(0.8) * normal(batch, cells, width)


def sample(writer: Writer, rng: np.random.Generator, size: int, *, text_share: float) -> list[Document]:
    """Documents of one training step."""
    content = Content()
    documents = []
    for _ in range(size):
        scene = content.sample(rng)
        kind = rng.random()
        if kind < 0.2:
            documents.append(writer.caption(scene, rng))
        else:
            documents.append(writer.questions(scene, rng, as_text=kind < 0.2 + text_share))
    return documents


def answer_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    as_text: bool,
    number: int,
) -> float:
    """Share of POPE-form questions about fresh scenes answered right, half of them adversarial.

    With `as_text` the context is the caption as ordinary text, otherwise clean bags of words.
    """
    import torch

    writer = Writer(tokenizer)
    yes_no = torch.tensor([writer.words["no"], writer.words["yes"]])
    documents, answers = [], []
    for index in range(number):
        scene = Content().sample(rng)
        question = next(exists_questions(scene, rng, adversarial=index % 2 == 0))
        context = writer.tokens(caption(scene)) if as_text else [writer.words["<image>"]] * CELLS
        ids = [writer.bos, *context, writer.newline, *writer.tokens(question.text)]
        ids += [writer.newline, writer.short]
        supervised = [False] * (len(ids) - 1) + [True]
        documents.append(Document(ids, supervised, None if as_text else writer.bags(scene, rng)))
        answers.append(question.answer == "yes")
    right = 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for start in range(0, number, 256):
            chunk = documents[start : start + 256]
            tokens, last, weights, soft = batch(chunk, vocab_size=len(tokenizer), pad=tokenizer.pad_token_id)
            embeds = embed(model, tokens, weights, soft, generator)
            hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            said = model.lm_head(hidden[last])[:, yes_no].argmax(-1).bool()
            right += int((said == torch.tensor(answers[start : start + 256])).sum())
    return right / number


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    batch_size: int = 48,
    learning_rate: float = 2e-3,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train in place with AdamW and a one-cycle learning rate; deterministic given `seed`."""
    import torch
    from torch.nn.functional import cross_entropy

    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    writer = Writer(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        documents = sample(writer, rng, batch_size, text_share=0.25)
        ids, supervised, weights, soft = batch(
            documents, vocab_size=len(tokenizer), pad=tokenizer.pad_token_id
        )
        embeds = embed(model, ids, weights, soft, generator)
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        predicts = supervised[:, 1:]
        loss = cross_entropy(model.lm_head(hidden[:, :-1][predicts]), ids[:, 1:][predicts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
