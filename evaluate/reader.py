"""A projector in front of the frozen LLM answers a benchmark from cached features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluate.benchmarks.base import Answer, Benchmark, Item
from pipeline.cache import FeatureCache
from pipeline.language import FrozenLanguageModel
from pipeline.manifest import canonical
from pipeline.projectors.base import Projector
from pipeline.prompts import Tokens, stop_string, tokenise_all


@dataclass(frozen=True)
class Reader:
    """A projector in front of the frozen LLM, looking at cached features.

    Attributes:
        template: How captions are asked for.
        question_template: How questions are asked.
        max_length: Tokens a prompt may have.
        batch_size: Prompts at a time.
    """

    language: FrozenLanguageModel
    projector: Projector
    cache: FeatureCache
    template: str
    question_template: str
    max_length: int
    batch_size: int


def answer(
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: dict[str, int],
    reader: Reader,
    path: Path,
    advance: Callable[[int], None],
) -> None:
    """Answer items and append each answer to the file as soon as its batch is done.

    Args:
        benchmark: Decides template, length and whether answers are likelihoods.
        items: What is still to be answered.
        rows: Cache row of every image.
        reader: The model.
        path: File to append to.
        advance: Called with the number of answers after every batch.
    """
    template = reader.template if benchmark.asks == "caption" else reader.question_template
    language = reader.language

    tokens = tokenise_all(
        [item.text for item in items],
        template,
        language.tokenizer,
        patches=reader.projector.tokens(reader.cache.patches),
        max_length=reader.max_length,
    )
    prompts = sorted(zip(tokens, items, strict=True), key=lambda pair: len(pair[0].ids))
    with path.open("ab") as file:
        for start in range(0, len(prompts), reader.batch_size):
            batch = prompts[start : start + reader.batch_size]
            features = reader.cache.tensor([rows[item.image] for _, item in batch])
            with torch.inference_mode():
                projected = reader.projector(features.float().to(language.device))
            asked = [each for each, _ in batch]
            replies: Iterator[Answer]
            if benchmark.likelihood:
                replies = iter(_likelihoods(language, asked, projected))
            else:
                ids, attention = language.collate_prompts(asked)
                replies = iter(
                    language.generate(
                        ids,
                        attention,
                        projected,
                        max_new_tokens=benchmark.max_new_tokens,
                        stop=stop_string(template),
                    )
                )
            for (_, item), reply in zip(batch, replies, strict=True):
                file.write(canonical({"id": item.id, "image": item.image, "answer": reply}) + b"\n")
            file.flush()
            advance(len(batch))


@torch.inference_mode()
def _likelihoods(language: FrozenLanguageModel, tokens: list[Tokens], projected: Tensor) -> list[Answer]:
    ids, labels = language.collate(tokens)
    losses, rows = language.token_losses(ids, labels, projected)
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, rows, losses.double())
    return [[float(total), float(each.supervised)] for total, each in zip(sums, tokens, strict=True)]
