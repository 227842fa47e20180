"""A projector in front of the frozen LLM answers a benchmark from cached features."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedcmp.evaluate.answers import BATCH
from fedcmp.evaluate.benchmarks.base import Answer, Asks, Item, Mode
from fedcmp.evaluate.benchmarks.retrieval import ranks_of
from fedcmp.evaluate.work import Work, rows_of
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import canonical
from fedcmp.pipeline.identity import language_options
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.models.language import load_language
from fedcmp.pipeline.models.projector import state_of
from fedcmp.pipeline.models.prompts import Tokens, require_system_prompt, stop_string, tokenise_all
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.ranks import ALONE, Place
from fedcmp.pipeline.records import Text, Turn
from fedcmp.pipeline.run_folder import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """A projector in front of the frozen LLM, looking at cached features.

    Attributes:
        template: How captions are asked for.
        question_template: How questions are asked.
        max_length: Tokens a prompt may have.
        batch_size: Prompts at a time.
    """

    model: VisionLanguage
    cache: FeatureCache
    template: str
    question_template: str
    max_length: int
    batch_size: int

    def template_for(self, asks: Asks) -> str:
        """How captions or questions are asked for."""
        return self.template if asks == "caption" else self.question_template

    def tokens(self, texts: Sequence[Text], template: str) -> list[Tokens]:
        """Tokens of texts, one more than `max_length` where a text is longer."""
        patches = self.model.projector.tokens(self.cache.patches)
        tokenizer = self.model.language.tokenizer
        return tokenise_all(texts, template, tokenizer, patches=patches, max_length=self.max_length + 1)

    @torch.inference_mode()
    def project(self, rows: Sequence[int]) -> Tensor:
        """Visual tokens of images: `(len(rows), tokens, d_llm)`."""
        return self.model.visual(self.cache.tensor(rows).float())


def load_reader(experiment: Experiment, run: Run, name: str, cache: FeatureCache) -> Reader:
    """The frozen LLM behind a projector of a run, by the projector's file within it.

    Raises:
        UserError: The file holds other weights than the run ended with, or a model cannot be loaded.
    """
    options, device = experiment.language, pick_device(experiment.device)
    projector = run.projector(name)
    language = load_language(options.path, **language_options(experiment))
    model = VisionLanguage(projector.to(device).eval(), language)
    model.load(state_of(projector) | run.adapter(name))
    return Reader(
        model,
        cache,
        options.template,
        options.question_template,
        language.at_most(options.max_length),
        experiment.evaluate.batch_size,
    )


@dataclass(frozen=True)
class Failure:
    """Why an item has no answer."""

    reason: str


def answer(
    work: Work,
    items: Sequence[Item],
    reader: Reader,
    path: Path,
    advance: Callable[[int], None],
    place: Place = ALONE,
) -> None:
    """Answer items and append each answer to the file as soon as its batch is done.

    An item whose prompt does not fit is recorded as failed and stops no other. Items with one key are
    one question, asked once.

    Raises:
        UserError: The prompt template has no place for the benchmark's system prompt.

    Args:
        work: Its benchmark decides template, length and how answers come about.
        items: What is still to be answered; all of them for a benchmark that retrieves.
        reader: The model.
        path: File to append to.
        advance: Called with the number of answers after every batch.
        place: Which batches are answered here; where that is not all, lines have the number of theirs.
    """
    benchmark, rows = work.benchmark, rows_of(reader.cache)
    asks, mode = benchmark.asks, benchmark.mode
    length, stop = benchmark.max_new_tokens, benchmark.stop
    if benchmark.system_prompt is not None:
        tokenizer = reader.model.language.tokenizer
        require_system_prompt(reader.template_for(asks), tokenizer, benchmark.system_prompt)
    once = list({work.keys[item.id]: item for item in items}.values())
    advance(len(items) - len(once))
    numbers = chain([-1] if place.first else [], count(place.rank, place.count))
    with path.open("ab") as file:
        found = answers(reader, once, rows, asks=asks, mode=mode, length=length, stop=stop, place=place)
        for number, batch in zip(numbers, found, strict=False):
            for item, said in batch:
                told: dict[str, Any] = (
                    {"failed": said.reason} if isinstance(said, Failure) else {"answer": said}
                )
                if place != ALONE:
                    told[BATCH] = number
                line = {"key": work.keys[item.id], "benchmark": work.name, "id": item.id, "image": item.image}
                file.write(canonical(line | told) + b"\n")
            file.flush()
            advance(len(batch))


def answers(
    reader: Reader,
    items: Sequence[Item],
    rows: dict[str, int],
    *,
    asks: Asks,
    mode: Mode,
    length: int,
    stop: Sequence[str] = (),
    place: Place = ALONE,
) -> Iterator[list[tuple[Item, Answer | Failure]]]:
    """Answers batch by batch, in the order that is fastest; those that cannot be given come first.

    Rank 0 begins with these, and has all that is retrieved; of whole batches rank r has r, r + count, ….

    Args:
        reader: The model.
        items: What to answer.
        rows: Cache row of every image.
        asks: Selects the template.
        mode: How answers come about.
        length: Tokens a generated answer may have.
        stop: Texts before which a generated answer is cut.
        place: Which batches are answered.
    """
    if mode == "retrieve":
        if place.first:
            yield list(zip(items, _ranks(reader, items, rows), strict=True))
        return
    template = reader.template_for(asks)
    fitting, failed = _fitting(reader, items, template)
    if place.first:
        yield [(item, Failure(reason)) for item, reason in failed.items()]
    for batch in islice(_batches(_ordered(fitting), reader.batch_size), place.rank, None, place.count):
        asked = [tokens for tokens, _ in batch]
        done = [item for _, item in batch]
        images = list(dict.fromkeys(item.image for item in done))
        owners = [images.index(item.image) for item in done]
        projected = reader.project([rows[image] for image in images])
        if mode == "likelihood":
            measured = _likelihoods(reader.model, asked, projected[owners])
            yield [(item, _finite(each)) for item, each in zip(done, measured, strict=True)]
        elif mode in ("rank", "weigh"):
            losses = _option_losses(reader, done, projected[owners], template)
            yield [(item, _chosen(item, each, mode)) for item, each in zip(done, losses, strict=True)]
        else:
            end = stop_string(template)
            said = reader.model.generate(asked, projected, owners, max_new_tokens=length, stop=end)
            yield [(item, cut(each, stop)) for item, each in zip(done, said, strict=True)]


def cut(answer: str, stop: Sequence[str]) -> str:
    """What comes before the first of some texts, stripped; an answer with none of them as it is."""
    if not any(text in answer for text in stop):
        return answer
    return min((answer.split(text)[0] for text in stop), key=len).strip()


def _chosen(item: Item, losses: list[float] | Failure, mode: Mode) -> Answer | Failure:
    """The likeliest option, of equals the first, or what all of them have."""
    measured = losses if isinstance(losses, Failure) else _finite(losses)
    if isinstance(measured, Failure) or mode == "weigh":
        return measured
    return item.options[measured.index(min(measured))]


def _finite(likelihood: list[float]) -> list[float] | Failure:
    return likelihood if all(map(math.isfinite, likelihood)) else Failure("its likelihood is not finite")


def _ordered(fitting: Sequence[tuple[Tokens, Item]]) -> list[tuple[Tokens, Item]]:
    """Questions about one image together, and images in the order of their longest question.

    So an image's tokens are computed once, and little of a batch is padding.
    """
    longest: dict[str, int] = {}
    for tokens, item in fitting:
        longest[item.image] = max(longest.get(item.image, 0), len(tokens.ids))
    return sorted(fitting, key=lambda pair: (longest[pair[1].image], pair[1].image, len(pair[0].ids)))


def _batches(sequence: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]


def _fitting(
    reader: Reader, items: Sequence[Item], template: str
) -> tuple[list[tuple[Tokens, Item]], dict[Item, str]]:
    """Prompts of items, and why some have none."""
    fitting, failed = [], {}
    for each, item in zip(_checked(reader, [item.text for item in items], template), items, strict=True):
        if isinstance(each, str):
            failed[item] = each
        else:
            fitting.append((each, item))
    return fitting, failed


def _checked(reader: Reader, texts: Sequence[Text], template: str) -> list[Tokens | str]:
    """Tokens of texts, or why one does not fit."""
    try:
        tokens: list[Tokens | str] = [*reader.tokens(texts, template)]
    except UserError:
        tokens = [_tokens_or_reason(reader, text, template) for text in texts]
    long = (
        f"its prompt has more than {reader.max_length} tokens, the lesser of language.max_length and the "
        "LLM's positions"
    )
    return [each if isinstance(each, str) or len(each.ids) <= reader.max_length else long for each in tokens]


def _tokens_or_reason(reader: Reader, text: Text, template: str) -> Tokens | str:
    try:
        return reader.tokens([text], template)[0]
    except UserError as error:
        return str(error)


@torch.inference_mode()
def _likelihoods(model: VisionLanguage, tokens: Sequence[Tokens], projected: Tensor) -> list[list[float]]:
    """Summed negative log-likelihood and number of supervised tokens of every text."""
    ids, labels = model.language.collate(tokens)
    losses, rows = model.losses(ids, labels, projected)
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, rows, losses.double())
    return [[float(total), float(each.supervised)] for total, each in zip(sums, tokens, strict=True)]


def _option_losses(
    reader: Reader, items: Sequence[Item], projected: Tensor, template: str
) -> Iterator[list[float] | Failure]:
    """The summed negative log-likelihood of every option, item by item."""
    texts = [Text((*item.text.turns, Turn("assistant", option))) for item in items for option in item.options]
    owners = [place for place, item in enumerate(items) for _ in item.options]
    checked = list(zip(_checked(reader, texts, template), owners, strict=True))
    reasons = {owner: each for each, owner in checked if isinstance(each, str)}
    fitting = [(each, owner) for each, owner in checked if not isinstance(each, str)]
    losses: dict[int, list[float]] = defaultdict(list)
    for batch in _batches(fitting, reader.batch_size):
        shown = projected[[owner for _, owner in batch]]
        measured = _likelihoods(reader.model, [each for each, _ in batch], shown)
        for (loss, _), (_, owner) in zip(measured, batch, strict=True):
            losses[owner].append(loss)
    for place in range(len(items)):
        yield Failure(reasons[place]) if place in reasons else losses[place]


@torch.inference_mode()
def _ranks(reader: Reader, items: Sequence[Item], rows: dict[str, int]) -> list[list[float]]:
    """Ranks of images and captions for each other, by cosine in the LLM's input space."""
    language = reader.model.language
    images = torch.cat(
        [
            reader.project([rows[item.image] for item in batch]).float().mean(1)
            for batch in _batches(items, reader.batch_size)
        ]
    )
    captions = [item.truth for item in items]
    owners = [place for place, several in enumerate(captions) for _ in several]
    flat = [caption for several in captions for caption in several]
    encoded = language.tokenizer(flat, add_special_tokens=False)["input_ids"]
    words = [language.words(torch.tensor(ids, device=language.device).long()).float() for ids in encoded]
    texts = torch.stack([each.sum(0) / max(len(each), 1) for each in words])
    near = normalize(texts - texts.mean(0)) @ normalize(images - images.mean(0)).T
    return ranks_of(near.cpu().numpy(), owners)
