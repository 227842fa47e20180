"""Prompts that everybody holds, server and sites alike: pictures and questions, by kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.preference.candidates import Asking, Candidates
from fedcmp.federate.preference.pairs import read_pairs
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import BadTextError


class Public:
    """Questions of several silos, each a kind, and preferences between answers where they have some.

    Args:
        caches: By kind.
        asking: How texts become token ids.
        length: Tokens that an answer may have.

    Raises:
        UserError: A silo has no question.

    Attributes:
        kinds: Names, in order.
        sizes: Questions of each kind.
        contents: SHA-256 of each cache.
        pairs: Preferences of each kind, to choose and to check by.
    """

    def __init__(self, caches: Mapping[str, FeatureCache], asking: Asking, length: int) -> None:
        self._caches, self._asking = list(caches.values()), asking
        self.kinds = tuple(caches)
        self._texts = [_askable(kind, cache, asking, length) for kind, cache in caches.items()]
        self.sizes = [len(texts) for texts in self._texts]
        for kind, size in zip(self.kinds, self.sizes, strict=True):
            if not size:
                raise UserError(
                    f"align.prompts: silo '{kind}' has no training text whose question could be asked; "
                    "remove it, or fix its source and extract it again"
                )
        self.contents = {kind: cache.content for kind, cache in caches.items()}
        self.pairs = {}
        for kind, cache in caches.items():
            self.pairs[kind], reasons = read_pairs(cache, asking)
            for reason in list(reasons.values())[:1]:
                say(f"{kind}: {len(reasons)} public preferences are left out; the first: {reason}")

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
        if places.ndim != 2 or places.shape[1] != 2 or not len(places):
            raise ValueError("no table of questions")
        if ((places < 0) | (places >= [[len(self.kinds), max(self.sizes)]])).any():
            raise ValueError("a question that does not exist")
        if any(number >= self.sizes[kind] for kind, number in places.tolist()):
            raise ValueError("a question that does not exist")
        highest = max((token for several in answers for answer in several for token in answer), default=0)
        if highest >= self._asking.language.rows:
            raise ValueError(f"token {highest}, where the LLM has {self._asking.language.rows}")
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


def _askable(kind: str, cache: FeatureCache, asking: Asking, length: int) -> np.ndarray:
    """`(n,)` int64: texts whose questions can be asked and answered; others are counted and said."""
    room = asking.language.at_most(sys.maxsize) - length
    kept, reasons = [], []
    for index in cache.usable_texts("train").tolist():
        try:
            (prompt,) = asking.prompts([cache.text(index)])
        except BadTextError as error:
            reasons.append(str(error))
            continue
        if len(prompt.ids) > room:
            reasons.append(f"{len(prompt.ids)} tokens leave no room for align.max_new_tokens = {length}")
            continue
        kept.append(index)
    for reason in reasons[:1]:
        say(f"{kind}: {len(reasons)} public questions cannot be asked and are left out; the first: {reason}")
    return np.array(kept, np.int64)


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
    parts = [sent.get(name) for name in ("places", "counts", "lengths", "tokens")]
    if not all(isinstance(part, Tensor) and part.dtype == torch.int64 for part in parts):
        raise ValueError("no tensors of int64")
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
