"""Prompts that everybody holds, server and sites alike: pictures and questions, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.preference.candidates import Asking, Candidates
from fedcmp.federate.preference.pairs import read_pairs
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError


class Public:
    """Questions of several silos, each a kind, and preferences between answers where they have some.

    Args:
        caches: By kind.
        asking: How texts become token ids.

    Raises:
        UserError: A silo has no question.

    Attributes:
        kinds: Names, in order.
        sizes: Questions of each kind.
        contents: SHA-256 of each cache.
        pairs: Preferences of each kind, to choose and to check by.
    """

    def __init__(self, caches: Mapping[str, FeatureCache], asking: Asking) -> None:
        self._caches, self._asking = list(caches.values()), asking
        self.kinds = tuple(caches)
        self._texts = [cache.usable_texts("train") for cache in self._caches]
        self.sizes = [len(texts) for texts in self._texts]
        for kind, size in zip(self.kinds, self.sizes, strict=True):
            if not size:
                raise UserError(
                    f"align.prompts: silo '{kind}' has no training text whose question could be asked; "
                    "remove it, or fix its source and extract it again"
                )
        self.contents = {kind: cache.content for kind, cache in caches.items()}
        self.pairs = {kind: read_pairs(cache, asking)[0] for kind, cache in caches.items()}

    def questions(self, kinds: Sequence[int], first: int, number: int, seed: int) -> np.ndarray:
        """Questions in an order of their own, kind by kind in turn; every pass over a kind has another.

        Args:
            kinds: Which.
            first: How many came before.
            number: How many.
            seed: Of the order.

        Returns:
            `(number, 2)` int64 of (kind, number of the question).
        """
        places, orders = [], {}
        for place in range(first, first + number):
            kind = kinds[place % len(kinds)]
            pass_, at = divmod(place // len(kinds), self.sizes[kind])
            if (kind, pass_) not in orders:
                rng = np.random.default_rng([seed, kind, pass_])
                orders[kind, pass_] = rng.permutation(self.sizes[kind])
            places.append((kind, int(orders[kind, pass_][at])))
        return np.array(places, np.int64)

    def candidates(self, places: np.ndarray, answers: Sequence[Sequence[list[int]]]) -> Candidates:
        """Answers to questions, one after the other.

        Args:
            places: `(questions, 2)` int64 of (kind, number of the question).
            answers: To each question.

        Raises:
            ValueError: There is no such question.
        """
        if ((places < 0) | (places >= [[len(self.kinds), max(self.sizes)]])).any():
            raise ValueError("a question that does not exist")
        if any(number >= self.sizes[kind] for kind, number in places.tolist()):
            raise ValueError("a question that does not exist")
        texts, features = [], []
        for kind, number in places.tolist():
            cache, index = self._caches[kind], int(self._texts[kind][number])
            texts.append(cache.text(index))
            features.append(cache.tensor([int(cache.text_image[index])]).float())
        prompts = self._asking.prompts(texts)
        counts = torch.tensor([len(several) for several in answers])
        owners = torch.arange(len(texts)).repeat_interleave(counts)
        return Candidates(
            torch.cat(features).to(self._asking.language.device),
            owners,
            [texts[place] for place in owners.tolist()],
            [prompts[place] for place in owners.tolist()],
            [answer for several in answers for answer in several],
        )


def as_tensors(places: np.ndarray, answers: Sequence[Sequence[list[int]]]) -> dict[str, Tensor]:
    """Questions by number and answers as token ids, as messages hold them."""
    flat = [answer for several in answers for answer in several]
    return {
        "places": torch.from_numpy(np.ascontiguousarray(places)),
        "counts": torch.tensor([len(several) for several in answers]),
        "lengths": torch.tensor([len(answer) for answer in flat]),
        "tokens": torch.tensor([token for answer in flat for token in answer], dtype=torch.int64),
    }


def as_lists(sent: Mapping[str, Tensor]) -> tuple[np.ndarray, list[list[list[int]]]]:
    """The inverse of `as_tensors`.

    Raises:
        ValueError: They are no such thing.
    """
    counts, lengths, tokens = sent["counts"], sent["lengths"], sent["tokens"]
    sizes = [len(sent["places"]), int(counts.sum()), int(lengths.sum())]
    if sizes != [len(counts), len(lengths), len(tokens)] or any(
        len(each) and int(each.min()) < 0 for each in (counts, lengths, tokens)
    ):
        raise ValueError("answers that do not fit their questions")
    flat = [each.tolist() for each in sent["tokens"].split(sent["lengths"].tolist())]
    answers, before = [], 0
    for count in sent["counts"].tolist():
        answers.append(flat[before : before + count])
        before += count
    return sent["places"].numpy(), answers
